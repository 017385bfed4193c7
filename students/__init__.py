"""Students: how they begin, and what they make when they are trained."""
