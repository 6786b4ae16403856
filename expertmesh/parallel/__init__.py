"""Models over many ranks: the mesh, what each rank holds, and how gradients come together."""
