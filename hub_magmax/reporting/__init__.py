"""A merge explained to people: card, figures, pages."""
