"""Routers between a merged model and its tasks' own checkpoints: fitted, measured, and asked."""
