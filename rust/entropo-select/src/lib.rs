//! Candidates, the key language and selection.
