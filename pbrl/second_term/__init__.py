"""The robot side of the bilevel methods: rollouts and labels into a guarded second term of the reward's gradient."""
