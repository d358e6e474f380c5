"""What scores responses: anything with `score_many(examples) -> list of [N]`; reward models, classifiers, baselines."""
