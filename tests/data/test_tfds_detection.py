"""TFDS sets of images with boxes."""

import numpy as np
import pytest

from flaxvision import data


@pytest.fixture(scope="module")
def tfds_objects(tmp_path_factory):
    """A prepared TFDS set with the features of VOC and COCO."""
    import io

    import tensorflow_datasets as tfds
    from PIL import Image

    class TinyObjects(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Two images: two objects, and none."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            objects = {
                "bbox": tfds.features.BBoxFeature(),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                "is_difficult": np.bool_,
                "is_crowd": np.bool_,
                "area": np.int64,
            }
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "objects": tfds.features.Sequence(objects),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index, size in enumerate([(20, 30), (25, 15)]):
                file = io.BytesIO()
                Image.fromarray(np.full((*size, 3), index, np.uint8)).save(file, "png")
                box = tfds.features.BBox(0.1, 0.2, 0.5, 0.6)
                one = {"bbox": box, "label": "dog", "is_difficult": True, "is_crowd": False, "area": 9}
                two = {"bbox": box, "label": "cat", "is_difficult": False, "is_crowd": True, "area": 8}
                yield index, {"image": file.getvalue(), "objects": [one, two] if index == 0 else []}

    folder = tmp_path_factory.mktemp("tfds_objects")
    TinyObjects(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds(tfds_objects):
    source = data.load_detection("tiny_objects", "train", data_dir=tfds_objects)
    first = int(np.argmax(source.counts))  # TFDS shuffles
    assert source.counts[first] == 2
    assert source.counts[1 - first] == 0
    assert source.sizes[[first, 1 - first]].tolist() == [[20, 30], [25, 15]]
    example = source[first]
    np.testing.assert_allclose(example["boxes"], [[6, 2, 18, 10]] * 2, rtol=1e-6)
    assert example["labels"].tolist() == [1, 0]
    assert example["difficult"].tolist() == [True, False]
    assert example["crowd"].tolist() == [False, True]
    assert example["area"].tolist() == [9, 8]
    assert example["image"].shape == (20, 30, 3)
    assert source[1 - first]["boxes"].shape == (0, 4)
    data.validate(source, task="detection")
    other = data.load_detection("tiny_objects", "train", data_dir=tfds_objects, classes=("cow", "dog", "cat"))
    assert other[first]["labels"].tolist() == [1, 2]
    assert other.fingerprint != source.fingerprint
    placed = data.on_canvases(source, 32)
    assert placed[first]["boxes"].shape == (2, 4)
    with pytest.raises(ValueError, match=r"split must name one or more of 'train' for 'tiny_objects'; got 'val'"):
        data.load_detection("tiny_objects", "val", data_dir=tfds_objects)


@pytest.fixture
def opened(monkeypatch):
    """Replaces every TFDS set by one image of 20x30 pixels with one box; lists the sets and splits that are opened."""
    import io
    from types import SimpleNamespace

    from PIL import Image

    from flaxvision.data import tfds

    file, opened = io.BytesIO(), []
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(file, "png")
    box = np.array([[1 / 20, 7 / 30, 20 / 20, 18 / 30]], np.float32)  # y from 1 to 20, x from 7 to 18
    records = [{"image": file.getvalue(), "objects": {"bbox": box, "label": np.zeros(1, int)}}]
    feature = {"bbox": None, "label": SimpleNamespace(names=["cat"])}
    features = {"image": None, "objects": SimpleNamespace(feature=feature)}

    def builder(name, data_dir):
        return SimpleNamespace(
            name=name.partition("/")[0],
            info=SimpleNamespace(features=features, full_name=name, splits=()),
            is_prepared=lambda: True,
            as_data_source=lambda split, decoders: opened.append((name, split)) or records,
        )

    monkeypatch.setattr(tfds, "_builder", builder)
    return opened


def test_voc_of_tfds_counts_from_one_and_others_do_not(opened):
    for name, first in (("voc/2007", (6, 0)), ("coco/2017", (7, 1))):
        source = data.load_detection(name, "train")
        np.testing.assert_allclose(source[0]["boxes"], [[*first, 18, 20]], atol=1e-5)
        assert source.counts.tolist() == [1]
    assert len({data.load_detection(name, "train").fingerprint for name in ("voc/2007", "coco/2017")}) == 2


def test_coco_of_tfds_by_the_names_of_the_archives(opened, tmp_path):
    (tmp_path / "coco" / "2017" / "1.1.0").mkdir(parents=True)
    (tmp_path / "coco" / "2017" / "1.1.0" / "dataset_info.json").write_text("{}")
    for split in ("train2017", "val2017", "test"):
        data.load_detection("coco", split, data_dir=tmp_path)
    assert opened == [("coco/2017", "train"), ("coco/2017", "validation"), ("coco", "test")]


def test_a_set_that_is_not_prepared(tmp_path):
    with pytest.raises(RuntimeError, match="TFDS set 'voc' is not prepared in"):
        data.load_detection("voc", "train", data_dir=tmp_path)
