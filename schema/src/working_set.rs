//! Which pages of a file a program touches. The type and its recorders come with the working-set work; the archive and
//! the envelope already know the kind, so that an archive written then stays readable by what is written now.
