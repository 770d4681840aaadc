//! The addresses of a server's name: looked up again and again, so that a server that moves is followed under traffic.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

/// How long an address that failed is tried last.
const BAD_FOR: Duration = Duration::from_secs(30);

/// Looks up the addresses of a `host:port`.
pub type Lookup =
    Arc<dyn Fn(String) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>> + Send + Sync>;

/// Returns the lookup that the system offers.
pub fn system() -> Lookup {
    Arc::new(|name| Box::pin(async move { Ok(tokio::net::lookup_host(name).await?.collect()) }))
}

/// What is known of a name's addresses.
pub struct Addresses {
    /// `host:port`; none where that is an address itself.
    name: Option<String>,
    lookup: Lookup,
    known: Mutex<KnownAddresses>,
    /// How often an address has left the list.
    moves: AtomicU32,
    asking: AtomicBool,
}

#[derive(Default)]
struct KnownAddresses {
    /// Each address, and until when it is tried last.
    addresses: Vec<(SocketAddr, Option<Instant>)>,
    asked: Option<Instant>,
    /// Counts the connections, so that they spread over the addresses.
    turn: usize,
}

impl Addresses {
    /// Returns the addresses of `host:port`, none of them known yet unless it is one.
    pub fn new(authority: &str, lookup: Lookup) -> Self {
        let fixed: Option<SocketAddr> = authority.parse().ok();
        let known = KnownAddresses {
            addresses: fixed.into_iter().map(|address| (address, None)).collect(),
            ..KnownAddresses::default()
        };
        let name = fixed.is_none().then(|| authority.to_string());
        Self { name, lookup, known: Mutex::new(known), moves: AtomicU32::new(0), asking: AtomicBool::new(false) }
    }

    fn known(&self) -> MutexGuard<'_, KnownAddresses> {
        self.known.lock().expect("nothing panics while it holds the addresses")
    }

    /// Returns a number that changes when an address was taken from the list: older connections may lead to it.
    pub fn moves(&self) -> u32 {
        self.moves.load(Relaxed)
    }

    /// Returns the addresses in the order in which they are to be tried: those that failed lately last, both families in
    /// turns, and each time another one first.
    pub async fn in_turn(&self) -> io::Result<Vec<SocketAddr>> {
        if self.known().addresses.is_empty() {
            self.look_up().await?;
        }
        let mut known = self.known();
        known.turn = known.turn.wrapping_add(1);
        let (turn, now) = (known.turn - 1, Instant::now());
        let is_bad = |until: Option<Instant>| until.is_some_and(|until| until > now);
        let of =
            |bad| known.addresses.iter().filter(move |(_, until)| is_bad(*until) == bad).map(|(address, _)| *address);
        let order = |addresses: Vec<SocketAddr>| interleaved(&addresses, turn);
        Ok([order(of(false).collect()), order(of(true).collect())].concat())
    }

    /// Says that an address failed, or took longer than another.
    pub fn failed(&self, address: SocketAddr) {
        let until = Some(Instant::now() + BAD_FOR);
        self.known().addresses.iter_mut().filter(|(known, _)| *known == address).for_each(|known| known.1 = until);
    }

    /// Returns true when the name is to be looked up again, since that was last done so long ago. Only one caller is told so.
    pub fn is_due(&self, every: Duration) -> bool {
        self.name.is_some()
            && self.known().asked.is_some_and(|asked| asked.elapsed() >= every)
            && !self.asking.swap(true, Relaxed)
    }

    /// Looks the name up again. When that fails, what was known stays.
    pub async fn refresh(&self) -> io::Result<()> {
        let found = self.look_up().await;
        self.known().asked = Some(Instant::now());
        self.asking.store(false, Relaxed);
        found
    }

    async fn look_up(&self) -> io::Result<()> {
        let Some(name) = self.name.clone() else { return Ok(()) };
        let found = (self.lookup)(name).await?;
        if found.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        let mut known = self.known();
        known.asked = Some(Instant::now());
        if known.addresses.iter().any(|(address, _)| !found.contains(address)) {
            self.moves.fetch_add(1, Relaxed);
        }
        let until = |address| known.addresses.iter().find(|known| known.0 == address).and_then(|known| known.1);
        known.addresses = found.into_iter().map(|address| (address, until(address))).collect();
        Ok(())
    }
}

/// Returns addresses with both families in turns (RFC 8305, 4), beginning with the first one's; `turn` shifts each family.
fn interleaved(addresses: &[SocketAddr], turn: usize) -> Vec<SocketAddr> {
    let Some(first) = addresses.first() else { return Vec::new() };
    let (mut one, mut other): (Vec<_>, Vec<_>) =
        addresses.iter().copied().partition(|address| address.is_ipv6() == first.is_ipv6());
    for family in [&mut one, &mut other] {
        if !family.is_empty() {
            let by = turn % family.len();
            family.rotate_left(by);
        }
    }
    let longer = one.len().max(other.len());
    (0..longer).flat_map(|i| [one.get(i), other.get(i)]).flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a lookup whose answers the test sets.
    fn told() -> (Lookup, Arc<Mutex<io::Result<Vec<SocketAddr>>>>) {
        let answer = Arc::new(Mutex::new(io::Result::Ok(Vec::new())));
        let given = answer.clone();
        let lookup: Lookup = Arc::new(move |_| {
            let answer = match &*given.lock().unwrap() {
                Ok(addresses) => Ok(addresses.clone()),
                Err(error) => Err(io::Error::from(error.kind())),
            };
            Box::pin(std::future::ready(answer))
        });
        (lookup, answer)
    }

    fn at(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    #[test]
    fn families_take_turns_and_so_do_addresses() {
        let all = ["[::1]:1", "[::2]:1", "10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"].map(at);
        let found: Vec<_> = interleaved(&all, 0).iter().map(SocketAddr::to_string).collect();
        assert_eq!(found, ["[::1]:1", "10.0.0.1:1", "[::2]:1", "10.0.0.2:1", "10.0.0.3:1"]);
        let found: Vec<_> = interleaved(&all, 1).iter().map(SocketAddr::to_string).collect();
        assert_eq!(found, ["[::2]:1", "10.0.0.2:1", "[::1]:1", "10.0.0.3:1", "10.0.0.1:1"]);
        assert!(interleaved(&[], 7).is_empty());
    }

    #[tokio::test]
    async fn a_name_that_moves_is_followed() {
        let (lookup, answer) = told();
        let [old, new] = ["10.0.0.1:80", "10.0.0.2:80"].map(at);
        let addresses = Addresses::new("model:80", lookup);
        assert!(addresses.in_turn().await.is_err());
        *answer.lock().unwrap() = Ok(vec![old]);
        assert_eq!(addresses.in_turn().await.unwrap(), [old]);
        assert!(!addresses.is_due(Duration::from_secs(60)));
        assert!(addresses.is_due(Duration::ZERO));
        assert!(!addresses.is_due(Duration::ZERO), "one is asking already");
        let before = addresses.moves();
        // An address more moves nobody.
        *answer.lock().unwrap() = Ok(vec![old, new]);
        addresses.refresh().await.unwrap();
        assert_eq!(addresses.moves(), before);
        *answer.lock().unwrap() = Ok(vec![new]);
        addresses.refresh().await.unwrap();
        assert_eq!(addresses.in_turn().await.unwrap(), [new]);
        assert_eq!(addresses.moves(), before + 1);
        // A resolver that fails takes nothing away.
        for failure in [Ok(vec![]), Err(io::ErrorKind::TimedOut.into())] {
            *answer.lock().unwrap() = failure;
            assert!(addresses.refresh().await.is_err());
            assert_eq!(addresses.in_turn().await.unwrap(), [new]);
        }
        assert_eq!(addresses.moves(), before + 1);
    }

    #[tokio::test]
    async fn an_address_that_failed_is_tried_last() {
        let (lookup, answer) = told();
        let [one, two] = ["10.0.0.1:80", "10.0.0.2:80"].map(at);
        *answer.lock().unwrap() = Ok(vec![one, two]);
        let addresses = Addresses::new("model:80", lookup);
        addresses.failed(one);
        assert_eq!(addresses.in_turn().await.unwrap(), [one, two], "nothing was known yet");
        addresses.failed(one);
        for _ in 0..4 {
            assert_eq!(addresses.in_turn().await.unwrap(), [two, one]);
        }
        addresses.refresh().await.unwrap();
        assert_eq!(addresses.in_turn().await.unwrap(), [two, one], "it failed a moment ago");
        addresses.failed(two);
        assert_eq!(addresses.in_turn().await.unwrap().len(), 2, "all are tried when all failed");
    }

    #[tokio::test]
    async fn an_address_is_looked_up_nowhere() {
        let lookup: Lookup = Arc::new(|name| panic!("{name} was looked up"));
        let addresses = Addresses::new("[::1]:80", lookup);
        assert_eq!(addresses.in_turn().await.unwrap(), [at("[::1]:80")]);
        assert!(!addresses.is_due(Duration::ZERO));
    }
}
