//! The contract of protos/rollmesh/api/environment/v1, for single turns.

use std::collections::HashMap;
use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::letters::{self, SPLITS};
use crate::pb;
use crate::pb::environment_service_server::EnvironmentService;

pub const NAME: &str = "sort-letters";
const MAX_SCORE_BATCH: usize = 1024;
const DEFAULT_PAGE: usize = 100;
const MAX_PAGE: usize = 1000;

pub struct Letters {
    tasks: Vec<letters::Task>,
    by_id: HashMap<String, usize>,
}

impl Letters {
    pub fn new() -> Self {
        let tasks = letters::tasks();
        let by_id = tasks
            .iter()
            .enumerate()
            .map(|(n, task)| (task.id.clone(), n))
            .collect();
        Self { tasks, by_id }
    }

    fn task(&self, id: &str) -> Result<&letters::Task, Status> {
        match self.by_id.get(id) {
            Some(&number) => Ok(&self.tasks[number]),
            None => Err(not_found("task", id)),
        }
    }

    fn score(&self, number: usize, item: &pb::ScoreItem) -> Result<pb::Scored, Status> {
        let answer = match item.messages.last() {
            Some(message) if message.role == "assistant" => &message.content,
            _ => {
                let field = format!("items[{number}].messages");
                return Err(invalid(format!(
                    "{field}: the last is to be the assistant's"
                )));
            }
        };
        let task = item.task.clone().unwrap_or_default();
        // A job with tasks of its own sends their fields, with ids that are not known here.
        let letters = match task.fields.get("letters") {
            Some(letters) if letters::are_letters(letters) => letters,
            Some(letters) => {
                let field = format!("items[{number}].task.fields.letters");
                let allowed = format!("1 to {} of a-z", letters::MAX_LETTERS);
                return Err(invalid(format!(
                    "{field}: {} is not {allowed}",
                    quoted(letters)
                )));
            }
            None => &self.task(&task.id)?.letters,
        };
        let worth = letters::worth(letters, answer);
        Ok(pb::Scored {
            reward: worth.reward,
            rewards: HashMap::from([
                ("exact".to_owned(), worth.exact / 2.0),
                ("positions".to_owned(), worth.positions / 2.0),
            ]),
            feedback: format!("it is {}", worth.answer),
            failure: String::new(),
        })
    }
}

#[tonic::async_trait]
impl EnvironmentService for Letters {
    type EpisodeStream = Pin<Box<dyn Stream<Item = Result<pb::EpisodeResponse, Status>> + Send>>;

    async fn describe(
        &self,
        _: Request<pb::DescribeRequest>,
    ) -> Result<Response<pb::DescribeResponse>, Status> {
        let split = |(name, count): (&str, usize)| pb::Split {
            name: name.to_owned(),
            num_tasks: count as i64,
        };
        let environment = pb::Environment {
            name: NAME.to_owned(),
            version: "1".to_owned(),
            description: "A few letters to put into alphabetical order.".to_owned(),
            has_score: true,
            observation_kinds: vec![pb::ObservationKind::Text.into()],
            deterministic: true,
            limits: Some(pb::Limits {
                max_score_batch: MAX_SCORE_BATCH as i32,
                max_answer_time: Some(prost_types::Duration {
                    seconds: 1,
                    nanos: 0,
                }),
                ..Default::default()
            }),
            splits: SPLITS.into_iter().map(split).collect(),
            ..Default::default()
        };
        Ok(Response::new(pb::DescribeResponse {
            environments: vec![environment],
        }))
    }

    async fn list_tasks(
        &self,
        request: Request<pb::ListTasksRequest>,
    ) -> Result<Response<pb::ListTasksResponse>, Status> {
        let request = request.into_inner();
        check_name(&request.environment)?;
        let Some(&(split, count)) = SPLITS.iter().find(|(name, _)| *name == request.split) else {
            let found = quoted(&request.split);
            return Err(invalid(format!(
                "split: {found} is neither train nor heldout"
            )));
        };
        let size = match usize::try_from(request.page_size) {
            Err(_) => {
                return Err(invalid(format!(
                    "page_size: {} is negative",
                    request.page_size
                )))
            }
            Ok(0) => DEFAULT_PAGE,
            Ok(size) => size.min(MAX_PAGE),
        };
        let start = page_start(&request.page_token, split, count)?;
        let end = count.min(start + size);
        let of_split = self.tasks.iter().filter(|task| task.split == split);
        Ok(Response::new(pb::ListTasksResponse {
            tasks: of_split
                .skip(start)
                .take(end - start)
                .map(to_proto)
                .collect(),
            next_page_token: if end < count {
                format!("{split}:{end}")
            } else {
                String::new()
            },
        }))
    }

    async fn get_task(
        &self,
        request: Request<pb::GetTaskRequest>,
    ) -> Result<Response<pb::GetTaskResponse>, Status> {
        let request = request.into_inner();
        check_name(&request.environment)?;
        let task = self.task(&request.task_id)?;
        Ok(Response::new(pb::GetTaskResponse {
            task: Some(to_proto(task)),
        }))
    }

    async fn score(
        &self,
        request: Request<pb::ScoreRequest>,
    ) -> Result<Response<pb::ScoreResponse>, Status> {
        let request = request.into_inner();
        check_name(&request.environment)?;
        if !(1..=MAX_SCORE_BATCH).contains(&request.items.len()) {
            let count = request.items.len();
            return Err(invalid(format!(
                "items: {count} is not in [1, {MAX_SCORE_BATCH}]"
            )));
        }
        let items = request.items.iter().enumerate();
        let scored = items
            .map(|(number, item)| self.score(number, item))
            .collect::<Result<_, _>>()?;
        Ok(Response::new(pb::ScoreResponse { scored }))
    }

    async fn episode(
        &self,
        _: Request<Streaming<pb::EpisodeRequest>>,
    ) -> Result<Response<Self::EpisodeStream>, Status> {
        Err(Status::unimplemented(format!(
            "{NAME} has single turns only"
        )))
    }
}

/// The number that a page token of this split stands for: "train:100".
fn page_start(token: &str, split: &str, count: usize) -> Result<usize, Status> {
    if token.is_empty() {
        return Ok(0);
    }
    let number = token
        .strip_prefix(split)
        .and_then(|rest| rest.strip_prefix(':'));
    match number.and_then(|text| text.parse().ok()) {
        Some(start) if (1..count).contains(&start) && token == format!("{split}:{start}") => {
            Ok(start)
        }
        _ => Err(invalid(format!(
            "page_token: {} was not made here for {split}",
            quoted(token)
        ))),
    }
}

fn to_proto(task: &letters::Task) -> pb::Task {
    pb::Task {
        id: task.id.clone(),
        split: task.split.to_owned(),
        messages: vec![pb::Message {
            role: "user".to_owned(),
            content: task.prompt(),
            ..Default::default()
        }],
        fields: HashMap::from([("letters".to_owned(), task.letters.clone())]),
    }
}

fn check_name(environment: &str) -> Result<(), Status> {
    if environment.is_empty() || environment == NAME {
        return Ok(());
    }
    Err(not_found("environment", environment))
}

fn invalid(message: String) -> Status {
    Status::invalid_argument(message)
}

fn not_found(what: &str, value: &str) -> Status {
    Status::not_found(format!("{what}: there is no {}", quoted(value)))
}

/// What a caller sent, shortened: it goes back in a trailer, and those have to stay small.
fn quoted(value: &str) -> String {
    format!("{:?}", value.chars().take(60).collect::<String>())
}
