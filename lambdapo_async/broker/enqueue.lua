-- Accept one group that was put down a moment ago, under a name of its own and with an expiry: descriptor, number and
-- bytes, all or nothing.
-- KEYS[1] = state, KEYS[2] = queue, KEYS[3] = accepted, KEYS[4] = committed, KEYS[5] = leases, KEYS[6] = holders,
-- KEYS[7] = todo, KEYS[8] = heldout, KEYS[9] = answered, KEYS[10] = payload,
-- KEYS[11] = the group as it was put down
-- ARGV[1] = epoch, ARGV[2] = producer, ARGV[3] = seq, ARGV[4] = lease id, ARGV[5] = min version,
-- ARGV[6] = mean reward, ARGV[7] = payload's bytes, ARGV[8] = answered ids kept
local producer, seq, lease, size = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[7])
local state = redis.call('HMGET', KEYS[1], 'epoch', 'bytes', 'max_groups', 'max_bytes', 'server', 'queued')
local accepted = redis.call('HMGET', KEYS[3], producer, '')
local last = tonumber(accepted[1] or '0')
local committed = tonumber(redis.call('HGET', KEYS[4], producer) or '0')
local epoch = state[1] or ''
-- One string travels with the reply to SET; a table would be sent, and wake the actor, on its own.
local function answer(status) return table.concat({status, last, committed, epoch}, ' ') end
local function refuse(status)
  redis.call('UNLINK', KEYS[11])
  return answer(status)
end

if seq <= last then
  -- Not even a lost payload is replaced: this may be a late group that had the number before.
  return refuse('DUP')
end
if state[5] ~= server_id() or not accepted[2] then return refuse('WAIT') end
if epoch ~= ARGV[1] then return refuse('EPOCH') end
if seq ~= last + 1 then return refuse('GAP') end

local holder = redis.call('HGET', KEYS[6], lease)
-- A producer is its actor's id, a dot and a number.
local ours = holder and (holder == producer or string.sub(producer, 1, #holder + 1) == holder .. '.')
if (holder and not ours) or redis.call('ZSCORE', KEYS[9], lease) then
  -- The number is not used up: the learner would wait for a group that never comes.
  redis.call('HINCRBY', KEYS[1], 'late', 1)
  if ours then
    redis.call('ZREM', KEYS[5], lease)
    redis.call('HDEL', KEYS[6], lease)
    if is_training(lease) then redis.call('HINCRBY', KEYS[1], 'admitted', -1) end
  end
  return refuse('LATE')
end

if size > tonumber(state[4]) then return refuse('TOO_BIG') end
local queued, num_bytes = tonumber(state[6] or '0'), tonumber(state[2] or '0')
if queued >= tonumber(state[3]) or num_bytes + size > tonumber(state[4]) then
  redis.call('HINCRBY', KEYS[1], 'full', 1)
  return refuse('FULL')
end
-- It expired on its way, or the learner swept it.
if redis.call('STRLEN', KEYS[11]) ~= size then return refuse('AGAIN') end

if ours then
  redis.call('ZREM', KEYS[5], lease)
  redis.call('HDEL', KEYS[6], lease)
elseif redis.call('LREM', is_training(lease) and KEYS[7] or KEYS[8], 1, lease) == 1 then
  count_in_line(KEYS[1], -1)
elseif is_training(lease) then
  -- Redis forgot this lease: it counts for the gate like any other.
  redis.call('HINCRBY', KEYS[1], 'admitted', 1)
end
redis.call('RENAME', KEYS[11], KEYS[10])
redis.call('PERSIST', KEYS[10])
local id = redis.call('XADD', KEYS[2], '*', 'p', producer, 's', seq, 'l', lease, 'v', ARGV[5], 'n', size, 'r', ARGV[6])
redis.call('HSET', KEYS[3], producer, seq)
redis.call('HSET', KEYS[1], 'bytes', num_bytes + size, 'queued', queued + 1)
-- An entry's id begins with the time, in milliseconds.
redis.call('ZADD', KEYS[9], string.sub(id, 1, string.find(id, '-', 1, true) - 1), lease)
redis.call('ZREMRANGEBYRANK', KEYS[9], 0, -(tonumber(ARGV[8]) + 1))
last = seq
return answer('OK')
