"""The comparison as it was fixed before its runs: which sets, which networks, and which of them against which."""

from __future__ import annotations

from dataclasses import dataclass

#: Of the dense network's multiply-adds, what all others have; and how far off is said to be off.
SHARE = 1 / 3
TOLERANCE = 0.02
#: Below which an adjusted p decides.
LEVEL = 0.05


@dataclass(frozen=True)
class PaysSet:
    """A data set and its network: the rows results/pays_<name>_<arm>.

    metric: what is compared, "error" in percent or "mae"; unit: of it, for headings.
    """

    name: str
    title: str
    metric: str = "error"
    unit: str = "error, %"

    def experiment(self, arm: str) -> str:
        """The experiment of an arm, which is its folder's name too."""
        return f"pays_{self.name}_{arm}"


SETS = {
    data.name: data
    for data in (
        PaysSet("casting", "castings, 96x96: small CNN"),
        PaysSet("meter", "meters: DN10"),
        PaysSet("faces", "age of faces, 48x48: DN10", "mae", "mean error, years"),
        PaysSet("gtsrb", "GTSRB, 32x32: STN"),
        PaysSet("mnist_dn10", "MNIST, 28x28: DN10"),
        PaysSet("mnist_cnn6", "MNIST, 28x28: CNN6"),
        PaysSet("tlmnist_dn10", "tlMNIST, 56x56: DN10"),
        PaysSet("tlmnist_cnn6", "tlMNIST, 56x56: CNN6"),
        PaysSet("pretrained", "castings, 96x96: pretrained EfficientNet-Lite0"),
    )
}

#: What each network of a set is.
ARMS = {
    "dense": "dense",
    "thin": "thin: every layer narrower",
    "pruned": "pruned: the trained dense network without its least channels",
    "targeted": "targeted: ROIs that learn",
    "converted": "converted: ROIs that learn, from the trained dense network",
    "centred": "control: ROIs in the middle, which do not learn",
    "random": "control: ROIs at random places, which do not learn",
}
#: The primary comparison of a set: the first against the better of the others.
OURS = "targeted"
RIVALS = ("thin", "pruned")
#: What else is looked at, without correction.
SECONDARY = (("targeted", "dense"), ("converted", "pruned"), ("targeted", "centred"), ("targeted", "random"))
