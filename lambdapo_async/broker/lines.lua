-- Prelude: the two lines of leases that wait to be granted. The state counts them: of a line that a server evicted,
-- nothing is left that could be missed.
local function is_training(lease) return string.sub(lease, 1, 6) == 'train:' end
local function count_in_line(state, change) redis.call('HINCRBY', state, 'in_line', change) end
local function put_in_front(state, todo, heldout, lease)
  redis.call('LPUSH', is_training(lease) and todo or heldout, lease)
  count_in_line(state, 1)
end
