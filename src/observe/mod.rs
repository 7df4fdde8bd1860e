//! What the product tells about itself: the status of the cluster and the progress of recoveries, as values with
//! stable field names, and as sentences for people. Nothing here asks anybody or decides anything.

pub mod explain;
pub mod progress;
pub mod status;
pub mod table;
pub mod time;
