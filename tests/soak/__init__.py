"""Random compositions of transforms, each checked against raw autograd, and what they leave behind."""
