"""What a trained model is for: verbs that open one and show it images."""
