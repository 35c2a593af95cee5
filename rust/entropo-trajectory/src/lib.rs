//! Raw agent records to one normal form.
