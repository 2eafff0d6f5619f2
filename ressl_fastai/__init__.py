"""Modules:

- `ressl_fastai.batch_norm`: Batch norm over parts of the batch, as several GPUs would compute it, over all GPUs, or by the statistics that weights came with; and shuffled batches.
- `ressl_fastai.callback`: `ReSSL`, the fastai callback: when views are made, the teacher follows and the queue moves on.
- `ressl_fastai.checkpoint`: `Checkpoint('run')`: after a crash the same line goes on where the training was, bit for bit.
- `ressl_fastai.checkpoint_file`: The file of a checkpoint: ordinary Python values as plain types, whole or not there, the last good one found.
- `ressl_fastai.cli`: `ressl_pretrain`, `ressl_evaluate`, `ressl_embed`, `ressl_prepare`: a folder of images becomes an encoder, accuracies, embeddings.
- `ressl_fastai.curate`: Use what the encoder has learned before there are labels: find duplicates, outliers and clusters, and what to label first.
- `ressl_fastai.data`: From a folder of images, or an array of small ones, to `DataLoaders`: found, looked at once, and decoded once.
- `ressl_fastai.detection`: The encoder as backbone of torchvision's Faster R-CNN and RetinaNet.
- `ressl_fastai.distributed`: Several processes, GPUs or machines train one model: `with learn.distrib_ctx(): learn.fit_one_cycle(100)`.
- `ressl_fastai.evaluate`: How good is the encoder? Embeddings of clean images, their nearest-neighbour accuracy and their linear accuracy.
- `ressl_fastai.feature_queue`: A first-in, first-out queue of teacher embeddings that takes batches of any size and is saved with the model.
- `ressl_fastai.files`: One way to write files, one way to read them back, and a lock for folders: nothing that was finished is lost.
- `ressl_fastai.fingerprint`: What a training's data are, in a few short texts: the same in every process, and able to say what differs.
- `ressl_fastai.health`: Is the training well? Collapse, a dead queue and NaN are seen, said in plain words, and stopped.
- `ressl_fastai.images`: One opener for all images: as viewers show them, with the file named in every error, and no bit cut off in silence.
- `ressl_fastai.interpret`: See what the encoder has learned: its relations, neighbours, a map.
- `ressl_fastai.label_efficiency`: How many labels does pretraining save? Accuracy by number of labelled images, with the baselines it must beat.
- `ressl_fastai.learner`: `ressl_learner(dls, arch)`: a fastai `Learner` that learns an encoder from images alone.
- `ressl_fastai.loaders`: What the package knows of a fastai `DataLoaders`: its images without augmentation, its normalisation, parts of it.
- `ressl_fastai.losses`: The relational loss of ReSSL: the student reproduces how the teacher relates an image to a queue of other images.
- `ressl_fastai.models`: An encoder from any architecture, a projector, an optional predictor, the teacher and the queue in one module.
- `ressl_fastai.optimizer`: `FusedAdam`: fastai's `Adam`, whose step on a GPU is one kernel for many parameters instead of ten for each.
- `ressl_fastai.precision`: bfloat16 autocast and channels-last layout on the device of the data, where they pay.
- `ressl_fastai.prepare`: Resize a folder of photographs once, so that every epoch after that reads small files.
- `ressl_fastai.publish`: Take the encoder elsewhere: weights for torchvision, timm or plain PyTorch, ONNX, a model card.
- `ressl_fastai.recipes`: `recipe('cifar10').learner(dls)`: the papers' experiments, every hyper-parameter with its source and open to change.
- `ressl_fastai.replay`: A training stopped at NaN: run that step again, alone, and see where it comes from.
- `ressl_fastai.report`: `learn.report()`: one self-contained HTML page of what was trained, how well it went, what the encoder sees, and how to use it.
- `ressl_fastai.runs`: What the commands do, once PyTorch is loaded: set up, train, measure, and write a folder of results.
- `ressl_fastai.same_fit`: Is it the same training? Settings and data as they can be kept, compared by name, and the split that is continued.
- `ressl_fastai.signs`: Coloured pictures with honest labels that need no download: signs of Unicode, to try everything on.
- `ressl_fastai.teacher`: The teacher: an exponential moving average of the student that no gradient reaches.
- `ressl_fastai.training_state`: Everything that a fit changes, to be kept on disk, or to be put back as if nothing had been.
- `ressl_fastai.transfer`: The encoder is learnt: keep it in a file, make a classifier of it in one line, or put it into any fastai learner.
- `ressl_fastai.views`: Weakly and strongly augmented views of a whole batch at once, where every image draws its own random numbers.
- `ressl_fastai.weights`: Encoders from the checkpoints of the official ReSSL code, of solo-learn, lightly and stable-pretraining."""

__version__ = "0.0.1"
