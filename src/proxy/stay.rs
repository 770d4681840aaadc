//! Whether a request may go to the canary, and stay there: its share can sink between the choice and the connection, and while
//! the answer comes.

use std::cell::Cell;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::domain::side::Side;

use super::dispose::Routed;
use super::table::{Route, RoutingTable, SideChoice};
use super::worker::Worker;

/// Time between two looks at the share of a canary that a request stays at.
const LOOK: Duration = Duration::from_millis(250);

/// Returns true while a request may be sent to the side that was chosen for it.
pub fn may_go(router: &RoutingTable, route: &Route, to: SideChoice) -> bool {
    to.side == Side::Stable || router.canary_share(route) > to.ticket
}

/// A request at the canary, or an upgraded connection: it ends `canary_grace_ms` after the canary lost all of its share.
pub struct CanaryStay {
    route: Arc<Route>,
    next_look: Cell<Instant>,
    withdrawn: Cell<Option<Instant>>,
}

impl CanaryStay {
    /// Returns the stay of a request that goes to the canary now; none of one that goes to stable.
    pub fn of(routed: &Routed) -> Option<Self> {
        Self::at(&routed.route, routed.to)
    }

    /// Returns the stay of a request that goes to this side of a route now; none at stable.
    pub fn at(route: &Arc<Route>, to: SideChoice) -> Option<Self> {
        let next_look = Cell::new(Instant::now() + LOOK);
        (to.side == Side::Canary).then(|| Self { route: route.clone(), next_look, withdrawn: Cell::new(None) })
    }

    /// Returns once the stay is over. It may be dropped and called again.
    async fn is_over(&self, worker: &Worker) {
        let grace = Duration::from_millis(worker.settings().canary_grace_ms);
        loop {
            sleep_until(self.next_look.get()).await;
            let now = Instant::now();
            self.next_look.set(now + LOOK);
            let is_withdrawn = worker.router.canary_share(&self.route) == 0;
            self.withdrawn.set(is_withdrawn.then(|| self.withdrawn.get().unwrap_or(now)));
            if self.withdrawn.get().is_some_and(|since| now >= since + grace) {
                return;
            }
        }
    }
}

/// Lets what a request does go on; none when its stay at the canary is over first.
///
/// It takes what is done by reference, because each future that holds another by value copies it into itself.
pub async fn during<T>(
    worker: &Worker,
    stay: Option<&CanaryStay>,
    doing: Pin<&mut impl Future<Output = T>>,
) -> Option<T> {
    let Some(stay) = stay else { return Some(doing.await) };
    tokio::select! {
        biased;
        () = stay.is_over(worker) => None,
        done = doing => Some(done),
    }
}
