"""Reports of a merge for people: card, figures, pages."""
