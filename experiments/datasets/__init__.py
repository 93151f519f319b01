"""What models are trained on: texts, images, series, and what is drawn as it is asked for."""
