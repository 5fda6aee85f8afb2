"""Fuzz: whatever a model says or a COCO file holds, the readers answer, or refuse with a message of ours."""
import json
import tempfile
from datetime import timedelta
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vision import regions
from vision.vlm.data import Scorer, parse_answer

FUZZ = settings(max_examples=500, deadline=timedelta(seconds=2), derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SIGNS = "0123456789０９٣²½(),.[]{}<>-–−－，、:=%\"' \n\u2028\x00\ud800xyé漢"
WORDS = ["12, 34", "(5,6),(7,8)", "<think>", "</think>", "<answer>", "</answer>", '"x": ', "9" * 400,
         " " * 900]
PIECES = st.sampled_from([*SIGNS, *WORDS, "1e9", "nan"])
EXAMPLE = {"prompt": "where?", "solution": [10, 20, 50, 60], "size": (112, 112), "scales": (1.0, 2.0)}


@FUZZ
@given(st.lists(PIECES, max_size=40).map("".join) | st.text(max_size=60))
def test_any_answer_is_a_place_or_none(text):
    said = parse_answer(text)
    assert said is None or len(said) in (2, 4) and all(isinstance(v, float) and v >= 0 for v in said)
    parts = {name: values.item() for name, values in Scorer.parts([text], [EXAMPLE]).items()}
    assert all(0 <= value <= 1 for value in parts.values())
    if said is None:
        assert not any(parts.values())
    elif "think" not in text and "answer" not in text:
        assert parse_answer(f"(1, 2)<think>(3, 4)</think> so <answer>{text}</answer>") == said


@FUZZ
@given(st.lists(st.integers(0, 999) | st.decimals(0, 999, places=2), min_size=1, max_size=6),
       st.sampled_from([", ", ",", " , "]),
       st.sampled_from(["({})", "[{}]", "{}", "at {}.", '{{"bbox": [{}]}}']))
def test_what_is_written_is_what_is_read(values, comma, frame):
    wanted = tuple(map(float, values)) if len(values) in (2, 4) else None
    assert parse_answer(frame.format(comma.join(map(str, values)))) == wanted


NUMBERS = st.integers(-3, 45) | st.floats() | st.just(10**400) | st.booleans()
ANY = st.recursive(st.none() | NUMBERS | st.text(max_size=4), lambda x: st.lists(x, max_size=3) |
                   st.dictionaries(st.sampled_from(["id", "bbox", "images", "annotations", "x"]), x,
                                   max_size=3),
                   max_leaves=6)
BOX = st.lists(st.integers(0, 20) | NUMBERS, min_size=4, max_size=4)


def entry(**fields):
    """A dict of these fields, of which any may be missing or hold anything."""
    mostly = {name: values | values | values | ANY for name, values in fields.items()}
    return st.fixed_dictionaries({}, optional=mostly)


IMAGE = entry(id=st.integers(0, 2), width=st.just(40), height=st.just(20),
              file_name=st.sampled_from(["a.png", "b.png", "../a.png", "", "\x00", "n" * 300, "\ud800"]))
NOTE = entry(id=st.integers(0, 9), image_id=st.integers(0, 2), bbox=BOX, iscrowd=st.integers(0, 1))
COCO = ANY | entry(images=st.lists(IMAGE, max_size=3), annotations=st.lists(NOTE, max_size=14))
GOOD = {"images": [{"id": 0, "width": 40, "height": 20, "file_name": "a.png"}]}
BOXES = st.lists(BOX, min_size=1, max_size=3).map(lambda boxes: GOOD | {
    "annotations": [{"id": i, "image_id": 0, "bbox": box} for i, box in enumerate(boxes)]})


@FUZZ
@given(COCO.map(json.dumps) | BOXES.map(json.dumps) | st.text(max_size=30))
def test_any_coco_file_is_read_or_refused(text):
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (40, 20)).save(Path(folder, "a.png"))
        Path(folder, "coco.json").write_bytes(text.encode(errors="surrogatepass"))
        try:
            files, targets = regions.coco_boxes(Path(folder))
        except SystemExit as left:
            assert left.code == 2
            return
        for file, target in zip(files, targets, strict=True):
            if target[1] == (40.0, 20.0) and Path(file).name == "a.png":
                share = regions.read_box(8, file, target)[1]
                assert ((0 <= share) & (share <= 1)).all() and (share[2:] >= share[:2]).all()


@FUZZ
@given(st.data())
def test_a_damaged_image_is_named(data):
    """Bit flips and cuts of image files: an image, or the reason."""
    from vision.data import Images, open_rgb, to_tensor
    kind = data.draw(st.sampled_from(["png", "jpg", "gif", "bmp", "tiff", "webp"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x.{kind}")
        Image.linear_gradient("L").resize((16, 16)).save(path)
        raw = bytearray(path.read_bytes())
        for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=6)):
            raw[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw[:data.draw(st.integers(0, len(raw)))])
        image, why, name = Images([str(path)], [0], [str(path)], lambda p, y: (to_tensor(open_rgb(p)), y))[0]
        assert image is None and why and "\n" not in why and name == str(path) or image.shape[0] == 3
