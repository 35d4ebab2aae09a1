"""Small detection data sets on disk."""

import json

import numpy as np
from PIL import Image

VOC = """<annotation><filename>{name}</filename><size><width>{width}</width><height>{height}</height><depth>3</depth>
</size>{objects}</annotation>"""
OBJECT = """<object><name>{0}</name><difficult>{5}</difficult><bndbox><xmin>{1}</xmin><ymin>{2}</ymin><xmax>{3}</xmax>
<ymax>{4}</ymax></bndbox></object>"""


def picture(path, size=(20, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def voc(folder, objects, *, size=(20, 30), stem="a", split="train"):
    """One image with objects (name, xmin, ymin, xmax, ymax, difficult); further calls add images to the folder."""
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    picture(folder / "JPEGImages" / f"{stem}.png", size)
    text = "".join(OBJECT.format(*each, *([0] * (6 - len(each)))) for each in objects)
    xml = VOC.format(name=f"{stem}.png", width=size[1], height=size[0], objects=text)
    (folder / "Annotations" / f"{stem}.xml").write_text(xml)
    with (folder / "ImageSets" / "Main" / f"{split}.txt").open("a") as file:
        file.write(stem + "\n")
    return folder


def coco(folder, annotations, *, images=((7, (20, 30)), (3, (25, 15))), categories=((2, "cat"), (5, "dog"))):
    """Images with ids and sizes; annotations as dicts."""
    entries = []
    for identity, size in images:
        picture(folder / "val" / f"{identity}.png", size)
        entries.append({"id": identity, "file_name": f"{identity}.png", "height": size[0], "width": size[1]})
    content = {
        "images": entries,
        "annotations": [{"id": i, **each} for i, each in enumerate(annotations)],
        "categories": [{"id": i, "name": name} for i, name in categories],
    }
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return folder


def yolo(folder, lines, *, size=(20, 30), stem="a", split="train", names=("cat", "dog")):
    picture(folder / "images" / split / f"{stem}.png", size)
    (folder / "classes.txt").write_text("\n".join(names))
    if lines is not None:
        (folder / "labels" / split).mkdir(parents=True, exist_ok=True)
        (folder / "labels" / split / f"{stem}.txt").write_text("\n".join(lines))
    return folder
