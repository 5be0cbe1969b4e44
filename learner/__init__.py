"""The learner process: groups in, weight versions out."""
