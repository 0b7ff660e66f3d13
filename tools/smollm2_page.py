def page(parts):
    return str({k: [v["minutes"] for v in w] for k, w in parts.items()})
