"""Models: loading any transformers image-text-to-text model, and the small LLaVA built in for the demo."""
