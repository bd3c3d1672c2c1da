"""Every setting of the server, typed, from flags, environment and file: one frozen object, built once.

A flag wins over an environment variable (`CHROMARPC_…`), which wins over the file (`--config FILE`, TOML).
An unknown or bad value stops the start.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ByteSize, Field, PositiveInt, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSuppress,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from chromarpc_server.device_settings import DeviceNames, RaySettings, ray_devices
from chromarpc_server.domain.limits import (
    Budgets,
    DeviceTimeouts,
    DownloadLimits,
    JobRetention,
    MasterPlace,
    MemoryChoice,
    RestartLimits,
    Tiling,
    UploadLimits,
    WeightsPlace,
)
from chromarpc_server.domain.models import REGISTRY, ModelSpec
from chromarpc_server.domain.resolve import PictureRecords
from chromarpc_server.limit_settings import LimitSettings
from chromarpc_server.model_settings import ImageSize, ModelFlags, ModelTables, configured_models, require_known
from chromarpc_server.platform_folders import default_data_dir
from chromarpc_server.ports import WantedPort
from chromarpc_server.transport.addresses import is_local, is_unix, parse_host, parse_tcp_host

_UPLOADS = UploadLimits()
_DOWNLOADS = DownloadLimits()
_RETENTION = JobRetention()
_RESTARTS = RestartLimits()
_TIMEOUTS = DeviceTimeouts()


Dtype = Literal["auto", "float32", "bfloat16"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
StoreKind = Literal["disk", "memory"]
MEMORY_STORE_BYTES = 512 * 1024**2
Profile = Literal["reference", "exact", "fp8", "preview", "preview-exact"]


Host = Annotated[str, AfterValidator(parse_host)]
TcpHost = Annotated[str, AfterValidator(parse_tcp_host)]


class ServerSettings(BaseSettings):
    """Serves the Chroma text-to-image pipeline over gRPC.

    Examples:
      chromarpc-server                                    serve what is here, on 127.0.0.1:50051
      chromarpc-server --alias chroma=chroma-mini         run production requests on a laptop
      chromarpc-server --lora-root ~/loras --preload chroma
      chromarpc-server --comfyui ~/ComfyUI/models         every Chroma that lies there, as it lies there
      chromarpc-server models --comfyui ~/ComfyUI/models  what was found, and what is missing
      chromarpc-server fetch chroma                       download the weights of Chroma1-Base
      chromarpc-server verify DIR                         check this install against recorded vectors
      chromarpc-server token NAME                         make a token, and the entry that lets it in
      chromarpc-server store check                        look after what is kept: also backup, restore, repair
      chromarpc-server --config server.toml               read settings from a file
      chromarpc-server --version                          print the version

    Every flag is also an environment variable (--lora-root is CHROMARPC_LORA_ROOT) and a key of the file
    (lora_root). A flag wins over the environment, which wins over the file.
    """

    model_config = SettingsConfigDict(
        env_prefix="CHROMARPC_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        cli_prog_name="chromarpc-server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    host: Host = Field(
        "127.0.0.1",
        description="address to bind, or unix:/PATH; others can reach the server unless it is that or loopback",
    )
    port: int = Field(50051, ge=0, le=65535, description="port to bind; 0 picks a free one; not of a Unix socket")
    insecure: bool = Field(
        False, description="allow binding a non-loopback address although traffic is not encrypted"
    )
    tls_cert: Path | None = Field(
        None, description="PEM file of the server's certificate and chain; with --tls-key, traffic is encrypted"
    )
    tls_key: Path | None = Field(None, description="PEM file of its private key, without a passphrase")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of authorities; every client must have a certificate of theirs (mutual TLS)"
    )
    callers: Path | None = Field(
        None,
        description="TOML file of who may call: names, hashes of their tokens, limits; `chromarpc-server token "
        "NAME` makes an entry; without it everyone who can connect may call",
    )
    device: str = Field("auto", description="the one device to compute on: auto, cpu, cuda or cuda:N")
    devices: DeviceNames | None = Field(
        None,
        description="several devices, each of which computes a job of its own: all (every GPU here), a list such "
        "as cuda:0,cuda:2 or cpu,cpu, or ray, ray:N, ray:MIN-MAX (GPUs of a Ray cluster; needs chromarpc[ray])",
    )
    ray: RaySettings = Field(default_factory=RaySettings, description="devices of a Ray cluster")
    cfg_parallel: bool = Field(
        False,
        description="take devices in pairs, in the order named: one computes guidance's conditional pass, the "
        "other the unconditional one, so that an image takes about half the time",
    )
    dtype: Dtype = Field(
        "auto",
        description="computation type; auto is float32 on a CPU, bfloat16 on a GPU; with float32 the profile "
        "preview-exact is not served",
    )
    threads: PositiveInt | None = Field(
        None, description="CPU threads of the computation; torch's choice if unset"
    )
    profile: Profile = Field("reference", description="numerics profile of requests that name none")
    lora_root: Path | None = Field(
        None, description="folder that requests' adapter paths are relative to; none are served if unset"
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="folder of jobs, their images, uploaded and fetched adapters; by default the platform's for "
        "this user's data; one server at a time",
    )
    max_upload_bytes: ByteSize = Field(
        ByteSize(_UPLOADS.max_file_bytes), description="bytes of one uploaded adapter; 0 takes no uploads"
    )
    max_uploads_bytes: ByteSize = Field(
        ByteSize(_UPLOADS.max_total_bytes), description="bytes of uploaded adapters together"
    )
    upload_expiry_s: float = Field(
        _UPLOADS.expiry_s, gt=0, description="seconds without bytes after which an upload is dropped"
    )
    lora_urls: bool = Field(True, description="fetch adapters that requests name by a public http(s) URL")
    lora_hosts: list[str] = Field(
        default_factory=list,
        description="hosts to fetch adapters from, such as huggingface.co or *.example.org; repeatable; any "
        "public one if unset",
    )
    max_download_bytes: ByteSize = Field(
        ByteSize(_DOWNLOADS.file_bytes), description="bytes of one fetched adapter"
    )
    download_cache_bytes: ByteSize = Field(
        ByteSize(_DOWNLOADS.cache_bytes), description="disk for fetched adapters, below the data folder"
    )
    download_timeout_s: float = Field(_DOWNLOADS.total_s, gt=0, description="seconds that one download may take")
    model: ModelFlags = Field(
        default_factory=dict,
        description="NAME=FILE_OR_REPO[,key=value...]: a model of a file, a folder or owner/name[:file] of the "
        "Hugging Face hub; keys: text_encoder, tokenizer, autoencoder, base_name, description, width, height, "
        "steps, guidance, sampler, schedule, shift, profile; repeatable",
    )
    models: CliSuppress[ModelTables] = Field(
        default_factory=dict,
        description="tables [models.NAME] of the file: the same keys, and transformer",
    )
    comfyui: Path | None = Field(
        None,
        description="a ComfyUI models folder: every Chroma below its diffusion_models, unet and checkpoints is "
        "served, with the text encoder and autoencoder that lie there; nothing is copied",
    )
    alias: dict[str, str] = Field(
        default_factory=dict, description="MODEL=OTHER: serve requests for MODEL by OTHER; repeatable"
    )
    model_folder: dict[str, Path] = Field(
        default_factory=dict,
        description="MODEL=DIR: folder with the model's transformer file, text_encoder_2/, tokenizer_2/ and "
        "vae/; repeatable; the Hugging Face cache otherwise",
    )
    preload: list[str] = Field(
        default_factory=list, description="models to load before the server says SERVING; repeatable"
    )
    warm_up: list[ImageSize] = Field(
        default_factory=list,
        description="WIDTHxHEIGHT of images that a GPU is warmed up for while preloading; repeatable; the "
        "model's default size if unset",
    )
    resident_checkpoints: PositiveInt = Field(2, description="checkpoints kept in memory")
    prepared_bytes: ByteSize | None = Field(
        None,
        description="memory for prepared adapter sets, and for text encoders of the preview profiles, such as "
        "40GB; one is always kept; by default what the device has to spare, 256 MiB on a CPU",
    )
    adapter_cache_bytes: ByteSize = Field(
        ByteSize(2 * 1024**3), description="host memory for parsed adapters, such as 2GiB"
    )
    master_place: MasterPlace = Field(
        "auto",
        description="where master weights stay on a GPU: device, host (page-locked, or mapped from the file where "
        "the host has too little), or what fits",
    )
    device_memory: ByteSize | None = Field(
        None, description="memory of the GPU to use at most, such as 24GB; all that is free if unset"
    )
    weights: WeightsPlace = Field(
        "auto",
        description="how a GPU holds the transformer: dequantized (fastest), float8 (half the memory, the same "
        "bits), or what fits",
    )
    text_encoder_place: MasterPlace = Field(
        "auto",
        description="where the text encoder stays: device, host (copied for every prompt), or what fits",
    )
    tiling: Tiling = Field(
        "auto",
        description="decode images in tiles, which changes pixels a little: on, off, or where memory is short",
    )
    limits: LimitSettings = Field(default_factory=LimitSettings, description="limits on requests")
    store: StoreKind = Field(
        "disk",
        description="where jobs are kept: disk (below the data folder; they outlive the process) or memory",
    )
    store_prompts: bool = Field(
        True,
        description="write prompts to the store on disk; without, jobs that did not end before a restart fail",
    )
    picture_record: bool = Field(
        True,
        description="let images carry what they were drawn with; without, none does, whatever it is asked",
    )
    job_keep_s: float = Field(
        _RETENTION.keep_s, gt=0, description="seconds that an ended job and its images can be asked for"
    )
    job_keep_bytes: ByteSize | None = Field(
        None,
        description="room for ended jobs and their images, the oldest go first; by default 10 GiB on disk, "
        "512 MiB in memory",
    )
    disk_reserve: ByteSize = Field(
        ByteSize(256 * 1024**2),
        description="room on the data folder's disk that is kept for jobs already taken: with less, no new job or "
        "upload is; 0 keeps none",
    )
    job_attempts: PositiveInt = Field(
        _RESTARTS.max_attempts,
        description="how often a job is begun when the server dies or is killed while it runs",
    )
    reattach_s: float = Field(
        _RESTARTS.reattach_s,
        ge=0,
        description="seconds that a job waits for its caller, which went away, to come back: after a restart, and "
        "after a lost connection where the request has a request_id",
    )
    step_timeout_s: float = Field(
        _TIMEOUTS.step_s, gt=0, description="seconds for one step after which the device is taken to hang"
    )
    load_timeout_s: float = Field(
        _TIMEOUTS.other_s,
        gt=0,
        description="seconds for anything else it does, loading and compiling, after which it is taken to hang",
    )
    grace_s: float = Field(30.0, ge=0, description="seconds that SIGTERM gives the running job to finish")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port of /metrics, /livez and /readyz; 0 picks a free one; none if unset"
    )
    metrics_host: TcpHost = Field(
        "127.0.0.1", description="address to bind for them; they tell no secrets, and ask nobody for a token"
    )
    traces: bool = Field(
        False,
        description="send OpenTelemetry traces to where OTEL_EXPORTER_OTLP_ENDPOINT says; needs chromarpc[otel]",
    )
    log_level: LogLevel = Field("info", description="least severe level that is logged")
    log_format: LogFormat = Field("text", description="text for people, json for machines")
    audit_log: Path | None = Field(
        None,
        description="file that cancels, deletions, inspections, reads of images and refused calls are written to, "
        "as JSON lines; opened again at SIGHUP; the ordinary log if unset",
    )

    def wanted_ports(self) -> list[WantedPort]:
        """What will be bound."""
        wanted = [WantedPort("--port", self.host, self.port)]
        if self.metrics_port is not None:
            wanted.append(WantedPort("--metrics-port", self.metrics_host, self.metrics_port))
        return wanted

    def budgets(self) -> Budgets:
        """How much may be resident."""
        memory = MemoryChoice(
            device_bytes=self.device_memory,
            weights=self.weights,
            text_encoder=self.text_encoder_place,
            master=self.master_place,
            tiling=self.tiling,
        )
        return Budgets(self.resident_checkpoints, self.prepared_bytes, self.adapter_cache_bytes, memory)

    def retention(self) -> JobRetention:
        """How long ended jobs stay."""
        default = _RETENTION.keep_bytes if self.store == "disk" else MEMORY_STORE_BYTES
        keep_bytes = default if self.job_keep_bytes is None else self.job_keep_bytes
        return JobRetention(keep_s=self.job_keep_s, keep_bytes=keep_bytes)

    def picture_records(self) -> PictureRecords:
        """Whether images may carry what they were drawn with."""
        if not self.picture_record:
            return PictureRecords.OFF
        keeps_prompts = self.store_prompts or self.store == "memory"
        return PictureRecords.WRITTEN if keeps_prompts else PictureRecords.KEPT_OUT

    def device_timeouts(self) -> DeviceTimeouts:
        """How long the device may take."""
        return DeviceTimeouts(step_s=self.step_timeout_s, other_s=self.load_timeout_s)

    def restarts(self) -> RestartLimits:
        """What becomes of jobs that an earlier process, or their caller, left."""
        return RestartLimits(max_attempts=self.job_attempts, reattach_s=self.reattach_s)

    def download_limits(self) -> DownloadLimits:
        """What downloads may take."""
        return DownloadLimits(
            file_bytes=self.max_download_bytes,
            cache_bytes=self.download_cache_bytes,
            total_s=self.download_timeout_s,
        )

    def upload_limits(self) -> UploadLimits:
        """What uploads may take."""
        return UploadLimits(
            max_file_bytes=self.max_upload_bytes,
            max_total_bytes=self.max_uploads_bytes,
            # A message must hold the chunk and the fields beside it.
            max_chunk_bytes=max(1, min(_UPLOADS.max_chunk_bytes, self.limits.max_request_bytes - 1024)),
            expiry_s=self.upload_expiry_s,
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self._in_ray and (self.device not in ("auto", "cuda", "cpu") or self.cfg_parallel):
            raise ValueError("--devices ray takes whole GPUs, or with --device cpu CPUs; Ray says which")
        if self.devices is not None and not self._in_ray and "device" in self.model_fields_set:
            raise ValueError("--device names one device and --devices several; give one of them")
        if self.cfg_parallel and self.devices is None:
            raise ValueError("--cfg-parallel needs --devices")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key come together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        if is_unix(self.host) and self.port and "port" in self.model_fields_set:
            raise ValueError(f"--port {self.port}: a Unix socket (--host {self.host}) has no port; leave it out")
        if not is_local(self.host) and self.tls_cert is None and not self.insecure:
            raise ValueError(
                f"--host {self.host} is not a loopback address and traffic is not encrypted: give --tls-cert and "
                "--tls-key, put a TLS proxy in front, or say --insecure if the network is trusted"
            )
        if self.lora_root is not None and not self.lora_root.is_dir():
            raise ValueError(f"--lora-root {self.lora_root} is not a folder")
        self._check_models()
        return self

    def _check_models(self) -> None:
        for model_id, folder in self.model_folder.items():
            if not self._in_ray and not folder.is_dir():
                raise ValueError(f"--model-folder {model_id}={folder}: not a folder")
        for source, target in self.alias.items():
            if target in self.alias:
                raise ValueError(f"--alias {source}={target}: {target} is an alias itself")
        if self.comfyui is not None and not self.comfyui.is_dir():
            raise ValueError(f"--comfyui {self.comfyui}: not a folder")
        configured = self.configured_models()
        if self.comfyui is None:  # else once it is known what lies there
            self.require_models({**REGISTRY, **configured})

    @property
    def _in_ray(self) -> bool:
        return self.devices is not None and ray_devices(self.devices) is not None

    def configured_models(self) -> dict[str, ModelSpec]:
        """The models that the settings describe one by one.

        Raises:
            ValueError: naming where, and the key.
        """
        return configured_models(self.models, self.model, must_exist=not self._in_ray)

    def require_models(self, known: Collection[str]) -> None:
        """Checks every setting that names a model.

        Raises:
            ValueError: naming the setting, and the models that there are.
        """
        require_known(known, aliases=self.alias, folders=self.model_folder, preloaded=self.preload)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags (added by CliApp, first), then environment, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)
