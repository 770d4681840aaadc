//! What librdkafka can do and its Rust client doesn't offer: headers as bytes, and the members of groups of either protocol.
//!
//! The client panics at a header whose name isn't UTF-8, which producers in other languages write. This is the only module with
//! `unsafe` code; each block says why it is sound.
#![allow(unsafe_code, reason = "librdkafka is a C library; nothing else of the project calls it by itself")]

use std::ffi::{CStr, CString};
use std::ptr::{self, NonNull};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::bindings as c;
use rdkafka::client::Client;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;

/// A header's name and value, as bytes; no value: it is null.
pub type RawHeader<'m> = (&'m [u8], Option<&'m [u8]>);

/// Returns the headers of a message, in order.
pub fn headers<'m>(message: &'m BorrowedMessage<'_>) -> Vec<RawHeader<'m>> {
    let Some(list) = list(message) else { return Vec::new() };
    let mut found = Vec::new();
    loop {
        let (mut name, mut value, mut size) = (ptr::null(), ptr::null(), 0);
        // SAFETY: `list` is the header list of `message`, which outlives this call; the three pointers are to locals.
        let answer =
            unsafe { c::rd_kafka_header_get_all(list.as_ptr(), found.len(), &mut name, &mut value, &mut size) };
        if answer != c::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
            return found;
        }
        // SAFETY: librdkafka ends each name with a zero byte, and keeps it until the list is changed or its message is destroyed.
        // Both need the message for themselves, which is borrowed for as long as the result lives.
        let name = unsafe { CStr::from_ptr(name) }.to_bytes();
        // SAFETY: `value` is null or points to `size` bytes that live as long as the name.
        let value = (!value.is_null()).then(|| unsafe { std::slice::from_raw_parts(value.cast::<u8>(), size) });
        found.push((name, value));
    }
}

/// Takes all headers of one name off a message.
pub fn remove_header(message: &mut BorrowedMessage<'_>, name: &CStr) {
    if let Some(list) = list(message) {
        // SAFETY: the message owns its list, and is borrowed mutably: nothing that was read of the list is still alive. That there
        // is no such header is no error of this function.
        unsafe { c::rd_kafka_header_remove(list.as_ptr(), name.as_ptr()) };
    }
}

/// Returns a message's own list of headers; none if it has no headers.
fn list(message: &BorrowedMessage<'_>) -> Option<NonNull<c::rd_kafka_headers_t>> {
    let mut list = ptr::null_mut();
    // SAFETY: `message.ptr()` is valid as long as the message, and the list, which the message owns, is written to a local.
    let answer = unsafe { c::rd_kafka_message_headers(message.ptr(), &mut list) };
    NonNull::new(list).filter(|_| answer == c::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR)
}

/// What a broker says of the members of a consumer group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupMembers {
    /// So many consumers, of the classic or of the consumer protocol.
    Count(usize),
    /// The broker doesn't describe the group: it isn't there, or its members have another protocol.
    Dead,
}

struct Queue(*mut c::rd_kafka_queue_t);

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: it was made by `rd_kafka_queue_new`, and is destroyed once.
        unsafe { c::rd_kafka_queue_destroy(self.0) }
    }
}

struct AdminRequest(*mut c::rd_kafka_AdminOptions_t);

impl Drop for AdminRequest {
    fn drop(&mut self) {
        // SAFETY: it was made by `rd_kafka_AdminOptions_new`, and is destroyed once.
        unsafe { c::rd_kafka_AdminOptions_destroy(self.0) }
    }
}

struct AdminAnswer(NonNull<c::rd_kafka_event_t>);

impl Drop for AdminAnswer {
    fn drop(&mut self) {
        // SAFETY: a queue gave it away; it is destroyed once, after all that was read of it.
        unsafe { c::rd_kafka_event_destroy(self.0.as_ptr()) }
    }
}

/// Asks how many members a consumer group has, of whichever protocol; waits up to `wait`.
///
/// # Errors
/// When no broker answers in time, or this client may not describe the group.
pub fn members<C: ClientContext>(client: &Client<C>, group: &str, wait: Duration) -> Result<GroupMembers, KafkaError> {
    let failed = |code: c::rd_kafka_resp_err_t| KafkaError::AdminOp(RDKafkaErrorCode::from(code));
    let group = CString::new(group)?;
    let wait_ms = i32::try_from(wait.as_millis()).unwrap_or(i32::MAX);
    let kafka = client.native_ptr();
    // SAFETY: `kafka` is the handle of `client`, which outlives what is made of it here.
    let queue = Queue(unsafe { c::rd_kafka_queue_new(kafka) });
    // SAFETY: as above.
    let options = AdminRequest(unsafe {
        c::rd_kafka_AdminOptions_new(kafka, c::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBECONSUMERGROUPS)
    });
    // SAFETY: `options` is alive; no text of an error is asked for, which a null buffer of no bytes says.
    let answer = unsafe { c::rd_kafka_AdminOptions_set_request_timeout(options.0, wait_ms, ptr::null_mut(), 0) };
    if answer != c::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
        return Err(failed(answer));
    }
    let mut groups = [group.as_ptr()];
    // SAFETY: the list of one name, the options and the queue are alive; librdkafka copies what it needs of the first two.
    unsafe { c::rd_kafka_DescribeConsumerGroups(kafka, groups.as_mut_ptr(), groups.len(), options.0, queue.0) };
    // SAFETY: the queue is alive. The event is ours from here on.
    let event = NonNull::new(unsafe { c::rd_kafka_queue_poll(queue.0, wait_ms) }).map(AdminAnswer);
    let Some(event) = event else {
        return Err(KafkaError::AdminOp(RDKafkaErrorCode::OperationTimedOut));
    };
    // SAFETY: the event is alive.
    let answer = unsafe { c::rd_kafka_event_error(event.0.as_ptr()) };
    if answer != c::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
        return Err(failed(answer));
    }
    // SAFETY: the event is alive; the result is a part of it, or null if it is of another kind.
    let result = unsafe { c::rd_kafka_event_DescribeConsumerGroups_result(event.0.as_ptr()) };
    if result.is_null() {
        return Err(KafkaError::AdminOp(RDKafkaErrorCode::Fail));
    }
    let mut count = 0;
    // SAFETY: the result is alive, and the number of groups is written to a local.
    let described = unsafe { c::rd_kafka_DescribeConsumerGroups_result_groups(result, &mut count) };
    if count != 1 || described.is_null() {
        return Err(KafkaError::AdminOp(RDKafkaErrorCode::Fail));
    }
    // SAFETY: there is one group, which lives as long as the event.
    let described = unsafe { *described };
    // SAFETY: `described` is alive; the error is a part of it, or null.
    let error = unsafe { c::rd_kafka_ConsumerGroupDescription_error(described) };
    if !error.is_null() {
        // SAFETY: the error lives as long as the event.
        return Err(failed(unsafe { c::rd_kafka_error_code(error) }));
    }
    // SAFETY: `described` is alive.
    let state = unsafe { c::rd_kafka_ConsumerGroupDescription_state(described) };
    if state == c::rd_kafka_consumer_group_state_t::RD_KAFKA_CONSUMER_GROUP_STATE_DEAD {
        return Ok(GroupMembers::Dead);
    }
    // SAFETY: `described` is alive.
    Ok(GroupMembers::Count(unsafe { c::rd_kafka_ConsumerGroupDescription_member_count(described) }))
}
