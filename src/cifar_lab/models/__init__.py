"""One architecture a file; each is ``classifier(features(images))`` and imports torch only."""
