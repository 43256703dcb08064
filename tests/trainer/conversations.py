"""Conversations of the tests' tasks as records: text, several turns, an image, two images."""

from trainer.data.records import Record, Turn

PATCHES = 4  # of an image, in either model folder
TEXT = Record("text", (), (Turn("How much is 2 plus one?", "It is 3."),), ())
TURNS = Record("turns", (), (Turn("How much?", "It is 3."), Turn("Are you sure?", "Yes, quite sure.")), ())
IMAGE = Record("image", ("images/colour_train_0.png",), (Turn("<image>\nWhat colour is it?", "red"),), ())
IMAGES = Record(
    "images",
    ("images/colour_train_1.png", "images/box_train_0.png"),
    (Turn("<image>\nWhat colour is it?", "green"), Turn("And where is it? <image>", "[0.00, 0.00]")),
    (),
)
