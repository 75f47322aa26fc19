use tokio::io::{AsyncWriteExt as _, BufReader, DuplexStream, duplex};

use super::*;

type Stream = BufReader<DuplexStream>;

fn key(pod: &str) -> Key {
    Key {
        client: pod.into(),
        source: [10, 0, 0, 1].into(),
        destination: ([10, 0, 0, 2], 80).into(),
    }
}

const PROOF: Proof = Proof { certificate: 1, bundle: 1, registration: 1 };

fn tunnel(key: Key) -> (Tunnel<Stream>, DuplexStream) {
    let (near, far) = duplex(64);
    let not_after = SystemTime::now() + Duration::from_secs(3600);
    let (made, stream) = (Instant::now(), BufReader::new(near));
    (Tunnel { key, proof: PROOF, made, not_after, stream }, far)
}

/// Puts a tunnel and returns the server's end of it.
fn put(pool: &Pool<Stream>, key: Key) -> DuplexStream {
    let (near, far) = tunnel(key);
    pool.put(near);
    far
}

/// Whether `near` is the other end of `far`.
async fn is_other_end(mut near: Tunnel<Stream>, far: &mut DuplexStream) -> bool {
    far.write_all(b"x").await.is_ok()
        && !is_quiet(&mut near.stream, &mut Context::from_waker(Waker::noop()))
}

async fn until_len(pool: &Pool<Stream>, len: usize) {
    let reached = async {
        while pool.len() != len {
            tokio::task::yield_now().await;
        }
    };
    let limit = Duration::from_secs(10);
    let waited = tokio::time::timeout(limit, reached).await;
    waited.unwrap_or_else(|_| panic!("{} tunnels where {len} should be", pool.len()));
}

#[tokio::test]
async fn the_last_one_used_is_the_next_and_keys_do_not_mix() {
    let pool = Pool::new(PoolLimits::default());
    let mut first = put(&pool, key("a"));
    let mut second = put(&pool, key("a"));
    let _other = put(&pool, key("b"));
    assert!(is_other_end(pool.take(&key("a"), PROOF).unwrap(), &mut second).await);
    assert!(is_other_end(pool.take(&key("a"), PROOF).unwrap(), &mut first).await);
    assert!(pool.take(&key("a"), PROOF).is_none());
    assert_eq!(pool.len(), 1);
    let elsewhere = Key { destination: ([10, 0, 0, 2], 81).into(), ..key("b") };
    assert!(pool.take(&elsewhere, PROOF).is_none());
    let other_address = Key { source: [10, 0, 0, 9].into(), ..key("b") };
    assert!(pool.take(&other_address, PROOF).is_none());
    assert!(pool.take(&key("b"), PROOF).is_some());
    assert!(pool.is_empty());
}

#[tokio::test]
async fn nothing_outlives_what_it_was_authenticated_under() {
    let pool = Pool::new(PoolLimits::default());
    for changed in [
        Proof { certificate: 2, ..PROOF },
        Proof { bundle: 2, ..PROOF },
        Proof { registration: 2, ..PROOF },
    ] {
        let mut far = put(&pool, key("a"));
        assert!(pool.take(&key("a"), changed).is_none());
        assert_eq!(pool.len(), 0);
        assert!(far.write_all(b"x").await.is_err(), "the stale tunnel is still open");
    }
    let (mut expired, _far) = tunnel(key("a"));
    expired.not_after = SystemTime::now();
    pool.put(expired);
    assert!(pool.take(&key("a"), PROOF).is_none());
    let _twin = put(&pool, key("a"));
    assert!(pool.take(&key("a"), PROOF).is_some());
}

#[tokio::test]
async fn of_a_key_that_has_enough_those_made_first_stay() {
    let pool = Pool::new(PoolLimits { per_key: 2, ..PoolLimits::default() });
    let mut made: Vec<_> = (0..4).map(|_| tunnel(key("a"))).collect();
    let not_after = made[0].0.not_after;
    for (number, (tunnel, _)) in made.iter_mut().enumerate() {
        tunnel.made += Duration::from_secs(number as u64);
        tunnel.not_after = not_after;
    }
    let [first, second, third, fourth] = <[_; 4]>::try_from(made).ok().unwrap();
    let mut ends = [first.1, second.1, third.1, fourth.1];
    for tunnel in [third.0, second.0, fourth.0, first.0] {
        pool.put(tunnel);
    }
    let mut open = Vec::new();
    for end in &mut ends {
        open.push(end.write_all(b"x").await.is_ok());
    }
    assert_eq!(open, [true, true, false, false]);
}

#[tokio::test]
async fn one_made_before_a_rotation_takes_no_place() {
    let pool = Pool::new(PoolLimits { per_key: 1, ..PoolLimits::default() });
    let (mut stale, _stale_end) = tunnel(key("a"));
    stale.proof.certificate -= 1;
    let (mut expiring, _expiring_end) = tunnel(key("a"));
    expiring.not_after -= Duration::from_secs(60);
    let _end = put(&pool, key("a"));
    pool.put(stale);
    pool.put(expiring);
    let kept = pool.take(&key("a"), PROOF).unwrap();
    assert!(kept.not_after > SystemTime::now() + Duration::from_secs(3550));
}

#[tokio::test]
async fn bounds_hold() {
    let pool = Pool::new(PoolLimits { per_key: 2, total: 3, ..PoolLimits::default() });
    let mut oldest = put(&pool, key("a"));
    let _second = put(&pool, key("a"));
    let mut surplus = put(&pool, key("a"));
    assert_eq!(pool.len(), 2);
    assert!(surplus.write_all(b"x").await.is_err(), "more than two for one key");
    let _third = put(&pool, key("b"));
    let _fourth = put(&pool, key("c"));
    assert_eq!(pool.len(), 3);
    assert!(oldest.write_all(b"x").await.is_err(), "the oldest has not given way");
    assert!(pool.take(&key("c"), PROOF).is_some());
}

#[tokio::test]
async fn one_that_ends_or_speaks_is_dropped_without_anybody_asking() {
    let pool = Pool::new(PoolLimits::default());
    let closed = put(&pool, key("a"));
    let mut says_goaway = put(&pool, key("a"));
    let _quiet = put(&pool, key("a"));
    tokio::task::yield_now().await;
    assert_eq!(pool.len(), 3);
    drop(closed);
    until_len(&pool, 2).await;
    says_goaway.write_all(&[6, 0, 0]).await.unwrap();
    until_len(&pool, 1).await;
    assert!(pool.take(&key("a"), PROOF).is_some());
}

#[tokio::test]
async fn one_that_ended_is_not_handed_out_even_before_the_task_has_run() {
    let pool = Pool::new(PoolLimits::default());
    let mut far = put(&pool, key("a"));
    far.write_all(&[6, 0, 0]).await.unwrap();
    drop(put(&pool, key("a")));
    assert_eq!(pool.len(), 2, "the task has run: this test shows nothing");
    assert!(pool.take(&key("a"), PROOF).is_none());
    // Nor is one kept that has ended already.
    let (near, far) = tunnel(key("a"));
    drop(far);
    pool.put(near);
    assert!(pool.is_empty());
}

#[tokio::test(start_paused = true)]
async fn idleness_ends() {
    let pool = Pool::new(PoolLimits { idle: Duration::from_secs(60), ..PoolLimits::default() });
    tokio::time::sleep(Duration::from_secs(45)).await;
    let _first = put(&pool, key("a"));
    tokio::time::sleep(Duration::from_secs(30)).await;
    let _second = put(&pool, key("b"));
    tokio::time::sleep(Duration::from_secs(29)).await;
    assert_eq!(pool.len(), 2);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(pool.len(), 1);
    assert!(pool.take(&key("a"), PROOF).is_none());
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(pool.len(), 0);
}

#[tokio::test]
async fn a_purge_takes_what_it_names() {
    let pool = Pool::new(PoolLimits::default());
    let mut gone = [put(&pool, key("a")), put(&pool, key("a"))];
    let _kept = put(&pool, key("b"));
    assert_eq!(pool.purge(|key, _| &*key.client == "a"), 2);
    for far in &mut gone {
        assert!(far.write_all(b"x").await.is_err());
    }
    assert_eq!(pool.purge(|_, proof| proof != PROOF), 0);
    assert_eq!(pool.len(), 1);
    assert!(pool.take(&key("b"), PROOF).is_some());
}

#[tokio::test]
async fn the_last_handle_takes_everything_along() {
    let pool = Pool::new(PoolLimits::default());
    let mut far = put(&pool, key("a"));
    let handle = pool.clone();
    drop(pool);
    assert_eq!(handle.len(), 1);
    let tasks = tokio::runtime::Handle::current().metrics();
    assert_eq!(tasks.num_alive_tasks(), 1);
    drop(handle);
    assert!(far.write_all(b"x").await.is_err());
    let ended = async {
        while tasks.num_alive_tasks() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), ended).await.expect("the task ends");
}
