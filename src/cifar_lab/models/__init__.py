"""One architecture per file: each is `classifier(features(images))`."""
