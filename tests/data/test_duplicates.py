"""What is known of equal images, and what of it a kill leaves."""

from pathlib import Path

from dvdp.data.duplicates import Seen


def test_equal_content_is_known_by_its_first_image_before_and_after_it_is_kept(tmp_path: Path) -> None:
    seen = Seen(tmp_path / "seen.mdb", 0)
    assert [seen.first(content, i) for i, content in enumerate([b"a", b"b", b"a"])] == [0, 1, 0]
    seen.commit()
    assert seen.first(b"b", 2) == 1
    seen.close()


def test_images_that_were_never_stored_are_no_ones_equal_after_a_kill(tmp_path: Path) -> None:
    seen = Seen(tmp_path / "seen.mdb", 0)
    for i, content in enumerate([b"a", b"b", b"c"]):
        seen.first(content, i)
    seen.commit()
    seen.close()
    # Of these only the first was stored when the process was killed.
    seen = Seen(tmp_path / "seen.mdb", 1)
    assert seen.first(b"c", 1) == 1
    assert seen.first(b"b", 2) == 2
    assert seen.first(b"a", 3) == 0
    seen.close()
