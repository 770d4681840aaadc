//! What a rollout is: values and arithmetic.
//!
//! Nothing here waits, reads a clock, draws a random number or touches a disk or socket; time is an argument. The
//! commit protocol that makes three nodes agree on these values is in [`crate::protocol`].

pub mod analysis;
pub mod apply;
pub mod assignment;
pub mod classes;
pub mod ids;
pub mod limits;
pub mod plan;
pub mod query;
pub mod rollout;
pub mod router_state;
pub mod routing;
pub mod run;
pub mod sequential;
pub mod side;
pub mod split;
pub mod stats;
pub mod text;
pub mod ticks;
pub mod time;
pub mod verdict;
pub mod weights;
pub mod window;
