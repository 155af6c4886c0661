def page(comparison, store):
    return ""
