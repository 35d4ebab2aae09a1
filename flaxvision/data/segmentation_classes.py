"""Class names of segmentation data sets, and tables from mask values to classes."""

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

# The values 1, 2 and 3 of the trimaps (Parkhi et al. 2012).
PET_CLASSES = ("pet", "background", "border")

# The 19 classes of the benchmark (Cordts et al. 2016).
CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# The masks have the values 0 to 33. Values outside the benchmark are unknown.
CITYSCAPES_VALUES = {id: _CITYSCAPES_IDS.index(id) if id in _CITYSCAPES_IDS else 255 for id in range(34)}

# The scene parsing benchmark (Zhou et al. 2017), with the first name of each class in its objectInfo150.txt. The masks
# have the values 1 to 150 for the classes, and 0 for everything else.
ADE20K_CLASSES = (
    *("wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet"),
    *("sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water"),
    *("painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk"),
    *("rock", "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box", "column", "signboard"),
    *("chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path"),
    *("stairs", "runway", "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge", "bookcase"),
    *("blind", "coffee table", "toilet", "flower", "book", "hill", "bench", "countertop", "stove", "palm"),
    *("kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus", "towel"),
    *("light", "truck", "tower", "chandelier", "awning", "streetlight", "booth", "television", "airplane"),
    *("dirt track", "apparel", "pole", "land", "bannister", "escalator", "ottoman", "bottle", "buffet", "poster"),
    *("stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool"),
    *("barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank"),
    *("trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture"),
    *("hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor"),
    *("bulletin board", "shower", "radiator", "glass", "clock", "flag"),
)
ADE20K_VALUES = {0: 255} | {k + 1: k for k in range(150)}
# The 50 classes without instances.
_STUFF = (
    *("wall", "building", "sky", "floor", "tree", "ceiling", "road", "grass", "sidewalk", "earth", "mountain"),
    *("plant", "water", "house", "sea", "rug", "field", "rock", "base", "sand", "skyscraper", "grandstand", "path"),
    *("runway", "stairway", "river", "bridge", "blind", "hill", "bar", "hovel", "tower", "dirt track", "land"),
    *("escalator", "buffet", "poster", "stage", "conveyer belt", "canopy", "swimming pool", "waterfall", "tent"),
    *("cradle", "tank", "lake", "blanket", "pier", "crt screen", "shower"),
)
# The 100 classes of the instance segmentation benchmark, in the order of its instanceInfo100_train.txt.
ADE20K_INSTANCE_CLASSES = tuple(name for name in ADE20K_CLASSES if name not in _STUFF)
