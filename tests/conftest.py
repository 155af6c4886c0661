"""The story is the longest file: it starts first, so that files run side by side end at about the same time."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_story.py")
