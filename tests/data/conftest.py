"""Small data sets that several test files read."""

import io

import numpy as np
import pytest
from PIL import Image


def picture(index, size=(6, 5)):
    return np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """Prepared TFDS sets: tiny_pictures (one size), tiny_photos (many sizes) and tiny_numbers (no images)."""
    import tensorflow_datasets as tfds

    class TinyPictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Nine pictures of three classes; the label tells which picture it is."""

        VERSION = tfds.core.Version("1.2.0")
        SHAPE: tuple[int | None, ...] = (6, 5, 3)
        SPLITS = ("train", "test")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=self.SHAPE),
                "label": tfds.features.ClassLabel(names=[f"c{k}" for k in range(9)]),
                "id": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in self.SPLITS}

        def _generate_examples(self, split):
            for i in range(9 if split == "train" else 4):
                size = (6, 5) if self.SHAPE[0] else (6 + i, 9)
                yield i, {"image": png(picture(i, size)), "label": i, "id": str(i)}

    class TinyPhotos(TinyPictures, skip_registration=True):
        """The same in different sizes, with a validation part instead of a test part."""

        SHAPE = (None, None, 3)
        SPLITS = ("train", "validation")

    class TinyNumbers(TinyPictures, skip_registration=True):
        """No images."""

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"value": np.int64}))

        def _generate_examples(self, split):
            yield 0, {"value": 1}

    folder = tmp_path_factory.mktemp("tfds")
    for builder in (TinyPictures, TinyPhotos, TinyNumbers):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder
