"""One node of Slurm for all tests of this folder."""

import pytest

from tests.support.slurm_node import Node
from tests.support.slurm_site import Site


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    node = Node(tmp_path_factory.mktemp("cluster") / "slurm")
    try:
        node.start()
        yield node
    finally:
        node.stop()


@pytest.fixture(scope="session")
def site(node, tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"), node)
    yield site
    site.close()
