"""The agent: SB3's SAC with its networks, replay, exploration bonus and fast update."""
