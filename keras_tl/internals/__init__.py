"""Every touch of a Keras internal, and every backend named, in keras_tl.

Nothing else in the package reads an underscore attribute of a Keras object or names a backend. Each
function says what it touches and why no public route serves, and `checked` with which versions.
"""
