"""A trained model in use: inference, demo page, export, model card and feature index."""
