-- Accept groups that were put down a moment ago, each under a name of its own and with an expiry: of each descriptor,
-- number and bytes, all or nothing. The first that is refused refuses those behind it.
-- KEYS[1] = state, KEYS[2] = queue, KEYS[3] = accepted, KEYS[4] = committed, KEYS[5] = leases, KEYS[6] = holders,
-- KEYS[7] = todo, KEYS[8] = heldout, KEYS[9] = answered, then for each group: payload, the group as it was put down
-- ARGV[1] = epoch, ARGV[2] = producer, ARGV[3] = answered ids kept, then for each group: seq, lease id, min version,
-- mean reward, payload's bytes
local producer = ARGV[2]
local state = redis.call('HMGET', KEYS[1], 'epoch', 'bytes', 'max_groups', 'max_bytes', 'server', 'queued')
local epoch, num_bytes, queued = state[1] or '', tonumber(state[2] or '0'), tonumber(state[6] or '0')
local accepted = redis.call('HMGET', KEYS[3], producer, '')
local last, num_taken = tonumber(accepted[1] or '0'), 0
local is_open = state[5] == server_id() and accepted[2]

-- The answer to a lease that the producer's actor holds (`ours`), or nobody.
local function settle(lease, ours)
  if ours then
    redis.call('ZREM', KEYS[5], lease)
    redis.call('HDEL', KEYS[6], lease)
  elseif redis.call('LREM', is_training(lease) and KEYS[7] or KEYS[8], 1, lease) == 1 then
    count_in_line(KEYS[1], -1)
  elseif is_training(lease) then
    -- Redis forgot this lease: it counts for the gate like any other.
    redis.call('HINCRBY', KEYS[1], 'admitted', 1)
  end
end

local function enqueue(payload, offered, seq, lease, min_version, mean_reward, size)
  -- Not even a lost payload is replaced: this may be a late group that had the number before.
  if seq <= last then return 'DUP' end
  if not is_open then return 'WAIT' end
  if epoch ~= ARGV[1] then return 'EPOCH' end
  if seq ~= last + 1 then return 'GAP' end

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
    return 'LATE'
  end

  if size > tonumber(state[4]) then return 'TOO_BIG' end
  if queued + num_taken >= tonumber(state[3]) or num_bytes + size > tonumber(state[4]) then
    redis.call('HINCRBY', KEYS[1], 'full', 1)
    return 'FULL'
  end
  -- It expired on its way, or the learner swept it.
  if redis.call('STRLEN', offered) ~= size then return 'AGAIN' end

  settle(lease, ours)
  redis.call('RENAME', offered, payload)
  redis.call('PERSIST', payload)
  local id = redis.call('XADD', KEYS[2], '*',
                        'p', producer, 's', seq, 'l', lease, 'v', min_version, 'n', size, 'r', mean_reward)
  -- An entry's id begins with the time, in milliseconds.
  redis.call('ZADD', KEYS[9], string.sub(id, 1, string.find(id, '-', 1, true) - 1), lease)
  last, num_taken, num_bytes = seq, num_taken + 1, num_bytes + size
  return 'OK'
end

local status, is_refused
for group = 1, (#KEYS - 9) / 2 do
  local key, arg = 8 + 2 * group, 5 * group - 1
  if not is_refused then
    status = enqueue(KEYS[key], KEYS[key + 1], tonumber(ARGV[arg]), ARGV[arg + 1], ARGV[arg + 2], ARGV[arg + 3],
                     tonumber(ARGV[arg + 4]))
    is_refused = status ~= 'OK' and status ~= 'DUP'
  end
  if status ~= 'OK' then redis.call('UNLINK', KEYS[key + 1]) end
end
if num_taken > 0 then
  redis.call('HSET', KEYS[3], producer, last)
  redis.call('HSET', KEYS[1], 'bytes', num_bytes, 'queued', queued + num_taken)
  redis.call('ZREMRANGEBYRANK', KEYS[9], 0, -(tonumber(ARGV[3]) + 1))
end
-- One string travels with the reply to SET; a table would be sent, and wake the actor, on its own.
return table.concat({status, last, tonumber(redis.call('HGET', KEYS[4], producer) or '0'), epoch}, ' ')
