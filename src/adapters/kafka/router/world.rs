//! A record router's world: Kafka's topics, the hooks of its file, HTTP to the data plane.

use std::sync::Arc;

use super::super::KafkaPush;
use super::{KafkaBroker, TopicNames};
use crate::adapters::clock::BootClock;
use crate::adapters::hooks::ServiceHooks;
use crate::adapters::post::HttpPost;
use crate::config::router::RouterConfig;
use crate::domain::side::Side;
use crate::ports::{Broker, Clock, Hooks, OutsideError, PushPorts, RouterTopics, RouterWorld};

/// What a router's file names, opened when it is asked for.
pub struct KafkaRouter(RouterConfig);

impl KafkaRouter {
    /// Returns the world that the file names. Nothing is opened yet.
    pub fn new(config: RouterConfig) -> Self {
        Self(config)
    }

    fn kafka(&self) -> Result<KafkaBroker, OutsideError> {
        KafkaBroker::new(&self.0.kafka, TopicNames::of(&self.0), Arc::new(BootClock))
    }
}

impl TopicNames {
    /// Returns what the topics, groups and versions of a router's file are called.
    pub fn of(config: &RouterConfig) -> Self {
        let of = |side| config.service(side).clone();
        let (stable, canary) = (of(Side::Stable), of(Side::Canary));
        Self {
            source: config.source.clone(),
            topics: [stable.topic, canary.topic],
            groups: [stable.group, canary.group],
            versions: [stable.version.to_string(), canary.version.to_string()],
            control: config.control(),
            router: config.group(),
        }
    }
}

impl RouterWorld for KafkaRouter {
    fn clock(&self) -> &dyn Clock {
        &BootClock
    }

    fn broker(&self) -> Result<Box<dyn Broker>, OutsideError> {
        Ok(Box::new(self.kafka()?))
    }

    fn topics(&self) -> Result<Box<dyn RouterTopics>, OutsideError> {
        Ok(Box::new(self.kafka()?))
    }

    fn hooks(&self) -> Box<dyn Hooks> {
        Box::new(ServiceHooks::new(&self.0))
    }

    fn push(&self) -> Result<PushPorts, OutsideError> {
        let Self(config) = self;
        let Some(push) = &config.push else {
            return Err(OutsideError::new("push", "the router's file has no spec.push"));
        };
        let group = &config.service(Side::Stable).group;
        let source = KafkaPush::new(&config.kafka, &config.source, group, &push.dead_letter)?;
        Ok((Box::new(source), Arc::new(HttpPost::new(push, &config.source))))
    }
}
