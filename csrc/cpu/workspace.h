// What one thread holds of one head: the operands of a chunk and the state, in panels (tile.h). About 310 KB at
// K = V = 128, of which a panel's turn touches 8 KB of state, 4 KB of values and streams the rest from L2.

struct Workspace {
  int64_t K, V;              // head sizes
  int64_t K_rows, V_panels;  // K rounded up to whole panels; number of value panels

  float* state;  // [V_panels][K_rows][PANEL]
  float* keys;     // [CHUNK / PANEL][K][PANEL]  k^T; times E per channel for channel decay
  float* readers;  // same, of q^T
  float* writers;        // [K_rows / PANEL][CHUNK][PANEL]  Kt = k exp(G_C - G)
  float* couplings;      // [CHUNK / PANEL][CHUNK][PANEL]  M^T, strictly upper: row j, column i > j
  float* scores;         // same, P^T, i >= j
  float* values;         // [CHUNK][PANEL]  b v, then Vn, of one value panel

  float* rows;  // [LANES][row_size] tokens being packed
  int64_t row_size;

  // Channel decay only: the chunk as rows of row_size floats, and one level of the dyadic split.
  float* gates;          // [CHUNK] rows of g
  float* key_rows;       // [CHUNK] rows of k
  float* reader_rows;    // [CHUNK] rows of q
  float* factors;        // [CHUNK] rows of exponentials
  float* level_keys;     // like keys, scaled for the level
  float* level_readers;  // like readers

  float beta[CHUNK];        // b
  float key_scale[CHUNK];   // what k^T S is multiplied by: b E, or b for channel decay
  float read_scale[CHUNK];  // what q^T S is multiplied by: scale E, or scale
  float to_end[CHUNK];      // exp(G_C - G) for head decay
  double log_decay[CHUNK];  // G for head decay; double because a difference of two large sums is wanted exactly
  float* keep;              // [K_rows] Gam of each row of the state

  float* memory;
};

// Place the arrays in `memory`, each on its own cache line; returns the floats needed. A null memory only counts.
static int64_t lay_out(Workspace& w, const Problem& p, float* memory) {
  int64_t used = 0;
  auto take = [&](int64_t n) {
    float* here = memory ? memory + used : nullptr;
    used += round_up(n, 16);
    return here;
  };
  const bool channel = p.gate == Gate::channel;
  const int64_t token_panels = CHUNK * p.K;
  w.K = p.K;
  w.V = p.V;
  w.K_rows = round_up(p.K, PANEL);
  w.V_panels = round_up(p.V, PANEL) / PANEL;
  w.row_size = round_up(max_of(p.K, p.V), PANEL);
  w.state = take(w.V_panels * w.K_rows * PANEL);
  w.keys = take(token_panels);
  w.readers = take(token_panels);
  w.writers = take(w.K_rows * CHUNK);
  w.couplings = take(CHUNK * CHUNK);
  w.scores = take(CHUNK * CHUNK);
  w.values = take(CHUNK * PANEL);
  w.rows = take(LANES * w.row_size);
  w.gates = take(channel ? CHUNK * w.row_size : 0);
  w.key_rows = take(channel ? CHUNK * w.row_size : 0);
  w.reader_rows = take(channel ? CHUNK * w.row_size : 0);
  w.factors = take(channel ? CHUNK * w.row_size : 0);
  w.level_keys = take(channel ? token_panels : 0);
  w.level_readers = take(channel ? token_panels : 0);
  w.keep = take(w.K_rows);
  return used;
}

// The thread's workspace for a problem; the memory grows to the largest problem seen and stays for the next call.
static Workspace& workspace_for(const Problem& p) {
  struct Owner {
    Workspace w{};
    int64_t capacity = 0;
    ~Owner() { std::free(w.memory); }
  };
  static thread_local Owner owner;
  const int64_t size = lay_out(owner.w, p, nullptr);
  if (size > owner.capacity) {
    std::free(owner.w.memory);
    owner.w.memory = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
    owner.capacity = owner.w.memory ? size : 0;
    if (!owner.w.memory) throw std::bad_alloc();
  }
  lay_out(owner.w, p, owner.w.memory);
  return owner.w;
}
