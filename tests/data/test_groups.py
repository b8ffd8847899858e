"""Groups of articles, from titles or from a column of a file."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from fastlvm.data import Payload, Windows, group_rows
from fastlvm.data.groups import title_prefix
from fastlvm.errors import InputError

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")
NOVELS = ["Emma", "Emma", "Dombey", "Dombey", "Emma", "Walden"]


def write(folder, records, ending=".jsonl"):
    path = folder / f"groups{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
        return path
    with (gzip.open if ending == ".jsonl.gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def per_article(names):
    return [{"article": article, "novel": name} for article, name in enumerate(names)]


def together(groups, payload):
    """The articles of each group."""
    return sorted(sorted({int(a) for a in payload.keys[groups == group, 0]}) for group in np.unique(groups))


@pytest.mark.parametrize(
    ("title", "prefix"),
    [
        ("Bleak House : ELTeC edition [CHAPTER I. In Chancery]", "Bleak House"),
        ("Belinda: A Novel [3]", "Belinda"),
        ("Emma [CHAPTER I: The - start (a)]", "Emma"),
        ("Paris (mythology)", "Paris"),
        ("Folle-Farine", "Folle-Farine"),
        ("Walden - Economy", "Walden"),
        ("Walden — Economy", "Walden"),
        ("At 10:30", "At 10:30"),
        ("  Alas!  A Novel  [2] ", "Alas! A Novel"),
        ("[untitled] (3)", "[untitled]"),
        ("1790_george_washington_n", "1790_george_washington_n"),
    ],
)
def test_what_of_a_title_names_the_work(title, prefix):
    assert title_prefix(title) == prefix


def test_articles_are_grouped_by_the_start_of_their_titles(payload_factory):
    titles = {article: f"{name} [CHAPTER {article}]" for article, name in enumerate(NOVELS)}
    payload = payload_factory(titles=titles)
    groups = group_rows(payload, "title-prefix")
    assert (groups.dtype, groups.shape) == (np.int32, (len(payload),))
    assert together(groups, payload) == [[0, 1, 4], [2, 3], [5]]
    windows = Windows.build(payload, split=(0.4, 0.3, 0.3), groups=groups, group_by="title-prefix")
    assert sorted(len(set(windows.groups(split).tolist())) for split in windows.splits) == [1, 1, 1]
    assert windows.verify(payload).group_overlap == 0


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("by", ["article", "row", "both"])
def test_articles_are_grouped_by_a_column(tmp_path, payload_factory, ending, by):
    payload = payload_factory()
    records = per_article(NOVELS)
    if by != "article":
        fields = ("row", "article", "novel") if by == "both" else ("row", "novel")
        records = [
            {name: value for name, value in
             {"row": row, "article": int(article), "novel": NOVELS[article]}.items() if name in fields}
            for row, article in enumerate(payload.keys[:, 0])
        ]  # fmt: skip
    found = group_rows(payload, "novel", write(tmp_path, records, ending))
    assert together(found, payload) == [[0, 1, 4], [2, 3], [5]]


def test_numbers_name_groups_too_and_articles_may_come_in_any_order(tmp_path, payload_factory):
    payload = payload_factory()
    records = [{"article": article, "novel": article % 2, "more": "x"} for article in (5, 3, 1, 0, 2, 4, 77)]
    assert together(group_rows(payload, "novel", write(tmp_path, records)), payload) == [[0, 2, 4], [1, 3, 5]]


def test_groups_are_numbered_by_name_whatever_the_order_of_the_file(tmp_path, payload_factory):
    payload = payload_factory()
    there = group_rows(payload, "novel", write(tmp_path, per_article(NOVELS)))
    back = group_rows(payload, "novel", write(tmp_path, per_article(NOVELS)[::-1]))
    np.testing.assert_array_equal(there, back)
    assert there[0] == 1 and there[-1] == 2  # Dombey, Emma, Walden


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r[:-2], r"has no novel for article 4 of payload .* \(2 such articles\)"),
        (lambda r: [*r, {"article": 0, "novel": "Walden"}], "row 6 puts article 0 into novel 'Walden', .*'Emma'"),
        (lambda r: [{"novel": "a"}] * 6, "has neither article nor row"),
        (lambda r: [{"row": at, "novel": "a"} for at in range(121)], "row 120 has row 120, and wants a row of"),
        (lambda r: [{"row": -1, "novel": "a"}], "row 0 has row -1"),
        (lambda r: [{"article": "0", "novel": "a"}], "row 0 has article '0', and wants a whole number"),
        (lambda r: [{"article": True, "novel": "a"}], "row 0 has article True"),
        (lambda r: [{"article": 0, "novel": 1.5}], "row 0 has novel 1.5, and wants a string or a whole number"),
        (lambda r: [{"article": 0, "novel": ["a"]}], r"row 0 has novel \['a'\]"),
        (lambda r: [{"article": 0, "author": "a"}], "no column novel|no `novel`"),
        (lambda r: [{"article": 0, "novel": None}], "no `novel`|novel None"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ENDINGS[:2])
def test_files_that_do_not_group_every_article_are_refused(tmp_path, payload_factory, change, match, ending):
    path = write(tmp_path, change(per_article(NOVELS)), ending)
    with pytest.raises(InputError, match=match) as caught:
        group_rows(payload_factory(), "novel", path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path, walk_payload):
    (tmp_path / "g.txt").write_text("x")
    (tmp_path / "g.jsonl").write_text("{")
    (tmp_path / "g.parquet").write_text("PAR1")
    for name, match in (
        ("none.jsonl", "does not exist: name a .parquet, .jsonl or .jsonl.gz file with a column novel"),
        ("g.txt", "ending that is not known"),
        ("g.jsonl", "row 0 is not valid JSON"),
        ("g.parquet", "not a parquet file"),
    ):
        with pytest.raises(InputError, match=match):
            group_rows(walk_payload, "novel", tmp_path / name)


def test_titles_that_are_not_there_are_refused(tmp_path, article_walks, payload_factory):
    vectors, keys = article_walks()
    bare = Payload.build(tmp_path / "bare", vectors, keys, encoder="e")
    for payload, match in (
        (bare, r"has no titles \(6 of 6 articles\)"),
        (payload_factory(titles=None, name="untitled"), r"has no titles \(6 of 6 articles\)"),
        (payload_factory(titles={0: "a", 1: "b", 3: " ", 4: "e", 5: "f"}, name="some"),
         r"no title for article 2 \(2 of 6 articles\)"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            group_rows(payload, "title-prefix")


def test_a_column_without_its_file_is_refused(walk_payload):
    with pytest.raises(InputError, match="group_by is 'novel', and wants title-prefix"):
        group_rows(walk_payload, "novel")


def test_real_titles_name_the_novels(real_data, tmp_path):
    folder = real_data.parent / "novels"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    keys = np.load(folder / "keys.npy")
    vectors = np.random.default_rng(0).standard_normal((len(keys), 4)).astype(np.float32)
    payload = Payload.build(tmp_path / "payload", vectors, keys, texts=folder / "texts.jsonl.gz", encoder="none")
    by_title = group_rows(payload, "title-prefix")
    assert 90 < len(np.unique(by_title)) < 100
    named = [(payload.title(int(row)) or "").partition(" [")[0] for row in np.unique(keys[:, 0], return_index=True)[1]]
    first = np.unique(keys[:, 0], return_index=True)[1]
    pairs = {(name, int(by_title[row])) for name, row in zip(named, first, strict=True)}
    assert len(pairs) == len(set(named))  # no novel in two groups
