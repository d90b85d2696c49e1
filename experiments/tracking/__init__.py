"""State tracking: can a linear memory follow the state of a group?"""
