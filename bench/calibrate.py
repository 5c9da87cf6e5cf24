def run(settings):
    raise NotImplementedError
