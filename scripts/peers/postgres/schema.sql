-- The application's two tables, with the types, checks and references of its migration.
CREATE TABLE pipeline_training_jobs (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL,
    status text NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'queued', 'initializing', 'running', 'completed', 'failed', 'cancelled')),
    progress integer DEFAULT 0,
    current_epoch integer,
    current_step integer,
    total_steps integer,
    current_loss double precision,
    current_learning_rate double precision,
    tokens_per_second double precision,
    final_loss double precision,
    training_time_seconds integer,
    adapter_file_path text,
    adapter_download_url text,
    actual_cost numeric(10, 2),
    error_message text,
    error_details jsonb,
    runpod_job_id text,
    started_at timestamptz,
    completed_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE pipeline_training_metrics (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    job_id uuid NOT NULL REFERENCES pipeline_training_jobs (id),
    metric_id text NOT NULL,
    metric_name text NOT NULL,
    metric_level text NOT NULL DEFAULT 'universal' CHECK (metric_level IN ('universal')),
    value double precision NOT NULL,
    unit text,
    step_number integer,
    epoch_number integer,
    measurement_method text,
    created_at timestamptz NOT NULL DEFAULT now()
);
