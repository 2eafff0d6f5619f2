"""Modules:

- `ressl_fastai.callback`: `ReSSL`, the fastai callback: when views are made, the teacher follows and the queue moves on.
- `ressl_fastai.cli`: `ressl_pretrain DATA`: from a folder of images to a pretrained encoder, from the shell.
- `ressl_fastai.data`: Real images that need no download: scikit-learn's handwritten digits as fastai `DataLoaders`.
- `ressl_fastai.evaluate`: How good is the encoder? Embeddings of clean images and their weighted nearest-neighbour accuracy.
- `ressl_fastai.feature_queue`: A first-in, first-out queue of teacher embeddings that takes batches of any size and is saved with the model.
- `ressl_fastai.learner`: `ressl_learner(dls, arch)`: a fastai `Learner` that learns an encoder from images alone, and hands the encoder over.
- `ressl_fastai.losses`: The relational loss of ReSSL: the student reproduces how the teacher relates an image to a queue of other images.
- `ressl_fastai.models`: An encoder from any architecture, a projector, an optional predictor, the teacher and the queue in one module.
- `ressl_fastai.teacher`: The teacher: an exponential moving average of the student that no gradient reaches.
- `ressl_fastai.views`: Weakly and strongly augmented views of a whole batch at once, where every image draws its own random numbers."""

__version__ = "0.0.1"
