"""What a model is made of: its structure read off tensor names, and the kinds of its layers."""
