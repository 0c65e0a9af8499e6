//! The nouns and rules of belljar: identifiers, limits, lifecycle. No IO happens here, so everything can be tested as
//! plain functions.

pub mod admission;
pub mod id;
pub mod key;
pub mod lifecycle;
pub mod limits;
