"""What is odd about checkpoints: by their configurations, and by samples of their values."""
