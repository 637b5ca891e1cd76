from data import Augmentation, TrainBatches, normalise  # noqa
